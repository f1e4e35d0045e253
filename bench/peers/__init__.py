"""Other implementations, measured by the same code as this one: `kvpress bench peers`."""
