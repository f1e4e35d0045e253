"""What is measured on a machine with a GPU, and how the kernels compile for one."""
