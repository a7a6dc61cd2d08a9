"""The decode engine: a model's decoding step as a few fused kernels a layer.

`spec` states a model as data, `engine` runs one step of it (captured in a CUDA graph on a GPU),
`loop` is `generate`'s decoding loop over that step.
"""
