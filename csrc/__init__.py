"""The C++ and CUDA sources: shipped with the package, compiled on the user's machine."""
