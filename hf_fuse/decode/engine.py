"""The decode engine: one step of a DecoderSpec for a batch of sequences over their KV caches.

A step embeds each sequence's token, runs the layers, selects the next token and moves one position
on, all on the device. On a GPU it is captured once in a CUDA graph and replayed; position and
token live in device tensors, so one graph serves every step.

Between kernels the residual stream, q, k, v and the logits are fp32. That costs nothing at these
sizes and is closer to the fp32 model than rounding them to bfloat16 would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse import ops
from hf_fuse.decode.projection import project, project_two
from hf_fuse.decode.sampling import Sampler, Selection
from hf_fuse.decode.spec import DecoderSpec, LayerSpec
from hf_fuse.ops.decode_select import workspace

CAPACITY_STEP = 256  # cache slots are allocated in steps of this, so that engines are used again
EXTRA_STEPS = 2  # the host is a step behind: a finished sequence is stepped once more


class DecodeEngine:
    """Buffers, caches and (on a GPU) the captured step for `batch` sequences of up to `capacity`
    tokens.
    """

    def __init__(self, spec: DecoderSpec, batch: int, capacity: int, backend: str = "auto"):
        self.spec, self.batch, self.backend = spec, batch, backend
        self.capacity = -(-(capacity + EXTRA_STEPS) // CAPACITY_STEP) * CAPACITY_STEP
        self.fingerprint = spec.fingerprint()
        self.device, self.dtype = spec.embedding.device, spec.embedding.dtype
        # With the selection, and by what, or without.
        self._graphs: dict[tuple[bool, Sampler | None], torch.cuda.CUDAGraph] = {}
        self._ending: tuple = ()  # what a captured step has taken as constants
        self._samplers: dict[tuple[bool, bool], Sampler] = {}
        self.sampler: Sampler | None = None  # without one, tokens are the largest logits'

        cache = (batch, spec.num_kv_heads, self.capacity, spec.head_dim)
        self.keys = [self._empty(*cache, dtype=self.dtype) for _ in spec.layers]
        self.values = [self._empty(*cache, dtype=self.dtype) for _ in spec.layers]
        self.token, self.finished, self.start = (self._zeros(batch) for _ in range(3))
        self.length, self.step = self._zeros(1), self._zeros(1)
        pinned = self.device.type == "cuda"
        self.history = torch.zeros(self.capacity, batch, dtype=torch.int64, pin_memory=pinned)
        self.eos, self.pad, self.min_step = self._zeros(0), 0, 0
        self._select_scratch = workspace(batch, self.device)

        hidden, heads = spec.embedding.shape[1], spec.num_heads
        self._residual = self._empty(batch, hidden)
        self._qkv = self._empty(batch, (heads + 2 * spec.num_kv_heads) * spec.head_dim)
        self._attended = self._empty(batch, heads, spec.head_dim, dtype=self.dtype)
        self._middles = {
            rows: self._empty(batch, rows, dtype=self.dtype)
            for rows in {_middle_rows(layer) for layer in spec.layers}
        }
        self.logits = self._empty(batch, sum(len(w) for w in spec.head.weights))

    def serves(self, spec: DecoderSpec, batch: int, capacity: int) -> bool:
        """Whether this engine does what one made with these arguments would."""
        return (
            self.batch == batch
            and self.capacity >= capacity + EXTRA_STEPS
            and self.fingerprint == spec.fingerprint()
        )

    def begin(
        self,
        length: int,
        start: Tensor,
        eos: Sequence[int],
        pad: int,
        min_step: int = 0,
    ) -> None:
        """Start at `length` tokens in the caches, of which start[b] are padding. The caches hold
        them already; `select` then takes the logits of the last one. Before step `min_step` no
        token is one of `eos`.
        """
        ending = (tuple(eos), pad, min_step)
        if ending != self._ending:
            self._graphs = {kind: g for kind, g in self._graphs.items() if not kind[0]}
            self._ending = ending
            self.eos = torch.tensor(eos, dtype=torch.int64, device=self.device)
            self.pad, self.min_step = pad, min_step
        self.start.copy_(start)
        self.length.fill_(length - 1)  # select moves on to the slot the new token will take
        self.step.zero_()
        self.finished.zero_()
        self.sampler = None

    def draw_by(self, selection: Selection, ids: Tensor) -> None:
        """After `begin`: tokens are drawn, or penalised, as `selection` says, after the prompts
        `ids`. What it filters by lies on the device, so another value needs no other graph.
        """
        kind = (selection.draws, selection.penalises)
        if kind not in self._samplers:
            with torch.inference_mode(False):  # as the engine itself
                self._samplers[kind] = Sampler(self.logits, *kind)
        self.sampler = self._samplers[kind]
        self.sampler.begin(selection, ids)

    def select(self, logits: Tensor) -> None:
        """Take the next token from `logits` [batch, vocab]."""
        self.logits.copy_(logits)
        self._draw()
        self._select()

    def _draw(self) -> None:
        if self.sampler:
            self.sampler.draw()

    def _select(self) -> None:
        state = (self.token, self.finished, self.history, self.length, self.step)
        end = (self.eos, self.pad, self.min_step)
        sampler, scratch, backend = self.sampler, self._select_scratch, self.backend
        if sampler is None:
            ops.decode_select(*state, scratch, self.logits, *end, backend=backend)
        else:
            ops.decode_sample(
                *state, scratch, sampler.seen, self.logits, sampler.noise, sampler.filters, *end,
                backend=backend,
            )  # fmt: skip

    def put(self, token: Tensor) -> None:
        """Take the next token from the caller, in place of `select`."""
        self.token.copy_(token)
        self.length.add_(1)
        self.step.add_(1)

    def advance(self, select: bool = True) -> None:
        """One step: the logits after `token` and, with `select`, the next token from them. On a GPU
        it is only launched.
        """
        if self.device.type != "cuda":
            self._run(select)
            return
        kind = (select, self.sampler)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(select)
        self._graphs[kind].replay()

    def _run(self, select: bool) -> None:
        spec, backend = self.spec, self.backend
        if select:  # first: the kernels from here on overlap, torch's with none
            self._draw()
        ops.decode_embed(
            self._residual, self.token, spec.embedding, spec.positions, self.length, self.start,
            backend=backend,
        )  # fmt: skip
        for index, layer in enumerate(spec.layers):
            self._layer(layer, self.keys[index], self.values[index])
        project(self.logits, self._residual, spec.head, norm=spec.final_norm, backend=backend)
        if select:
            self._select()

    def _layer(self, layer: LayerSpec, keys: Tensor, values: Tensor) -> None:
        spec, residual, backend = self.spec, self._residual, self.backend
        middle = self._middles[_middle_rows(layer)]
        if layer.one_kernel:
            project_two(
                (self._qkv, middle), residual, (layer.qkv, layer.mlp_in),
                (layer.attention_norm, layer.mlp_norm), act=layer.act, backend=backend,
            )  # fmt: skip
        else:
            project(self._qkv, residual, layer.qkv, norm=layer.attention_norm, backend=backend)
        ops.decode_attention(
            self._attended, self._qkv, keys, values, self.length, self.start,
            scaling=layer.scaling, inv_freq=spec.inv_freq, rope_scale=spec.rope_scale,
            interleaved=spec.interleaved, backend=backend,
        )  # fmt: skip

        def mlp_in() -> None:
            project(
                middle, residual, layer.mlp_in, norm=layer.mlp_norm,
                epilogue="gated" if layer.gated else "act", act=layer.act, backend=backend,
            )  # fmt: skip

        if layer.parallel and not layer.one_kernel:  # before attention is added to what it reads
            mlp_in()
        attended = self._attended.view(self.batch, -1)
        project(residual, attended, layer.attention_out, epilogue="add", backend=backend)
        if not layer.parallel:
            mlp_in()
        project(residual, middle, layer.mlp_out, epilogue="add", backend=backend)

    def _capture(self, select: bool) -> torch.cuda.CUDAGraph:
        """The step as a graph. Its first run, uncaptured, builds what is built once; then the state
        is put back. (What that run wrote to the caches and the history is written again.)
        """
        state = [self.token, self.finished, self.length, self.step]
        if self.sampler and self.sampler.seen is not None:
            state.append(self.sampler.seen)
        before = [t.clone() for t in state]
        drawn = self.sampler.generator_state() if self.sampler else None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._run(select)
            for t, b in zip(state, before, strict=True):
                t.copy_(b)
            if self.sampler:
                self.sampler.set_generator_state(drawn)
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._run(select)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graph

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def _middle_rows(layer: LayerSpec) -> int:
    rows = [len(w) for w in layer.mlp_in.weights]
    return rows[0] if layer.gated else sum(rows)
