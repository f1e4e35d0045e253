"""The pipe of a layer: phases of a forward pass, their stages, and the state that they work on."""
