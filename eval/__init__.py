"""The proof: perplexity, decoding speed and the demo.

`evaluate_perplexity` and `evaluate_decode` compare one model unpatched and patched; `hf-fuse ppl`,
`hf-fuse tpot` and `hf-fuse demo` are their command line.
"""
