"""The C++ and CUDA sources, shipped with the package and compiled on the user's machine by `hf_fuse.jit`."""
