"""The decode engine: one step of a DecoderSpec for a batch of sequences over their KV caches.

A step embeds each sequence's token, runs the layers, selects the next token and moves one position
on, all on the device. On a GPU it is captured once in a CUDA graph and replayed; position and
token live in device tensors, so one graph serves every step.

Between kernels the residual stream, q, k, v and the logits are fp32. That costs nothing at these
sizes and is closer to the fp32 model than rounding them to bfloat16 would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fuse import ops
from hf_fuse.decode.prefill import prefill
from hf_fuse.decode.projection import project, project_sum, project_two
from hf_fuse.decode.rolling import Rolling, Stream
from hf_fuse.decode.sampling import Sampler, Selection
from hf_fuse.decode.spec import DecoderSpec, LayerSpec, Norm
from hf_fuse.decode.stack import Stack
from hf_fuse.ops._library import use_kernel
from hf_fuse.ops.decode_select import workspace
from hf_fuse.ops.recording import recorded

CAPACITY_STEP = 256  # cache slots are allocated in steps of this, so that engines are used again
EXTRA_STEPS = 2  # the host is a step behind: a finished sequence is stepped once more
# Prompts of up to this many tokens in all take a GPU less time to run than the host to launch: they
# are padded to one of a few lengths, and the second of a length is a graph's replay.
GRAPH_TOKENS, SHORTEST_PROMPT = 256, 16


@dataclass(frozen=True)
class Kernel:
    """A launch of a step, and the weights that it reads the whole of."""

    name: str
    run: Callable[[], None]
    weights: tuple[Tensor, ...] = ()


class DecodeEngine:
    """Buffers, caches and (on a GPU) the captured step for `batch` sequences of up to `capacity`
    tokens. With a `stream`, `capacity` is only the prompt's, and up to `steps` tokens follow.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        batch: int,
        capacity: int,
        backend: str = "auto",
        stream: Stream | None = None,
        steps: int = 0,
    ):
        self.spec, self.batch, self.backend, self.stream = spec, batch, backend, stream
        self._step_spec = spec.for_step()
        self.capacity = _round_up(max(capacity, stream.capacity if stream else 0))
        self.fingerprint = spec.fingerprint()
        self.device, self.dtype = spec.embedding.device, spec.embedding.dtype
        # The step with the selection, and by what, or without; what it has taken as constants, and
        # the eos that it reads.
        self._graphs: dict[
            tuple[bool, Sampler | None], tuple[torch.cuda.CUDAGraph, tuple, Tensor]
        ] = {}
        self._ending: tuple = ()
        if self.device.type == "cuda":  # of all graphs: what they leave lies in other memory
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)
        self._prompts: dict[int, torch.cuda.CUDAGraph] = {}  # by padded length
        self._uncaptured: int | None = None  # the padded length of the last prompt, if not there
        self._samplers: dict[tuple[bool, bool], Sampler] = {}
        self.sampler: Sampler | None = None  # without one, tokens are the largest logits'

        cache = (len(spec.layers), batch, spec.num_kv_heads, self.capacity, spec.head_dim)
        keys, values = (self._empty(*cache, dtype=self.dtype) for _ in range(2))
        self.keys, self.values = ([*t.unbind()] for t in (keys, values))
        self.rolling = Rolling(spec, stream, keys, values) if stream else None
        self.token, self.finished, self.start = (self._zeros(batch) for _ in range(3))
        self.length, self.step = self._zeros(1), self._zeros(1)
        pinned = self.device.type == "cuda"
        rows = max(self.capacity, _round_up(steps))
        self.history = torch.zeros(rows, batch, dtype=torch.int64, pin_memory=pinned)
        self.eos, self.pad, self.min_step = self._zeros(0), 0, 0
        self._select_scratch = workspace(batch, self.device)

        hidden, heads = spec.embedding.shape[1], spec.num_heads
        self._residual = self._empty(batch, hidden)
        self._row = self._empty(batch, hidden, dtype=self.dtype)  # what a projection reads, and
        self._delta = self._empty(batch, hidden)  # what one adds, in a chained step
        self._qkv = self._empty(batch, (heads + 2 * spec.num_kv_heads) * spec.head_dim)
        self._attended = self._empty(batch, heads, spec.head_dim, dtype=self.dtype)
        self._middles = {
            rows: self._empty(batch, rows, dtype=self.dtype)
            for rows in {_middle_rows(layer) for layer in spec.layers}
        }
        self.logits = self._empty(batch, sum(len(w) for w in spec.head.weights))
        self._prompt = self._zeros(batch, GRAPH_TOKENS)
        self.kernels = tuple(self._kernels())
        self._launches = self.launches(kernel.run for kernel in self.kernels)

    def serves(
        self,
        spec: DecoderSpec,
        batch: int,
        capacity: int,
        stream: Stream | None = None,
        steps: int = 0,
    ) -> bool:
        """Whether this engine does what one made with these arguments would."""
        return (
            self.batch == batch
            and self.stream == stream
            and self.capacity >= capacity + EXTRA_STEPS
            and len(self.history) >= steps + EXTRA_STEPS
            and self.fingerprint == spec.fingerprint()
        )

    def launches(self, runs: Iterable[Callable[[], None]]) -> list[Callable[[], None]]:
        """`runs` as a step runs them: on a CPU, kernels that follow one another by one call."""
        if self.device.type == "cpu" and use_kernel(self.spec.embedding, self.backend):
            return recorded(runs)
        return list(runs)

    def begin(self, eos: Sequence[int], pad: int, min_step: int = 0) -> None:
        """Start anew, with empty caches; `prefill` or `fill` brings the prompt. Before step
        `min_step` no token is one of `eos`.
        """
        ending = (tuple(eos), pad, min_step)
        if ending != self._ending:
            self._ending = ending
            self.eos = torch.tensor(eos, dtype=torch.int64, device=self.device)
            self.pad, self.min_step = pad, min_step
        for state in (self.token, self.finished, self.start, self.step):
            state.zero_()
        self.length.fill_(-1)  # `select` and `put` move on to the slot of the token they take
        self.sampler = None
        if self.rolling:
            self.rolling.begin()

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

    def prepare(self, select: bool) -> None:
        """Between `begin` and the prompt: capture the step, if that is still to be done, so that
        the memory it takes is taken now.
        """
        constants, kind = self._ending if select else (), (select, self.sampler)
        captured = self._graphs.get(kind)
        if self.device.type == "cuda" and (captured is None or captured[1] != constants):
            # The one it replaces is freed after it: the graphs' pool must not be without any.
            self._graphs[kind] = self._capture_step(select), constants, self.eos

    def prefill(self, input_ids: Tensor, start: Tensor) -> None:
        """Run the prompt `input_ids` [batch, length], of which start[b] are padding."""
        length = input_ids.shape[1]
        padded, self._uncaptured = self._padded_length(length), None
        self.begin_at(length, start)
        if padded is None or bool(start.any()):
            self._run_prompt(input_ids, start)
            return
        self._prompt[:, :length] = input_ids
        if padded in self._prompts:
            self._prompts[padded].replay()
        else:
            self._run_prompt(self._prompt[:, :padded], start)
            self._uncaptured = padded

    def end(self) -> None:
        """After the last token: what would have delayed the first."""
        padded, self._uncaptured = self._uncaptured, None
        if padded is None:
            return
        prompt, no_padding = self._prompt[:, :padded], torch.zeros(self.batch)
        try:
            self._prompts[padded] = self._capture(lambda: self._run_prompt(prompt, no_padding))
        except RuntimeError as error:  # then the next prompt is launched again
            if not out_of_memory(error):
                raise

    def _padded_length(self, length: int) -> int | None:
        """A power of two for a prompt that is run as a graph, else None."""
        padded = max(SHORTEST_PROMPT, 1 << (length - 1).bit_length())
        if self.device.type != "cuda" or self.batch * padded > GRAPH_TOKENS:
            return None
        positions = self.spec.positions
        return None if positions is not None and padded > len(positions) else padded

    def _run_prompt(self, input_ids: Tensor, start: Tensor) -> None:
        spec = self.spec
        self._residual.copy_(
            prefill(spec, input_ids, start, self.length, self.keys, self.values, self.backend)
        )
        self._residual.div_(spec.residual_scale)
        if spec.chained:
            self._add_norm(None, spec.final_norm).run()
        for kernel in self._head():
            kernel.run()

    def fill(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        length: int,
        logits: Tensor,
        start: Tensor,
    ) -> None:
        """Take a prompt of `length` tokens that ran elsewhere: each layer's keys and values [batch,
        kv_heads, length, head_dim], or the last ones of them, and the last token's logits [batch,
        vocab]. With a stream, those of the sinks and the window.
        """
        held = keys[0].shape[2] if self.rolling else length
        for own, given in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            own[:, :, held - given.shape[2] : held].copy_(given)
        self.logits.copy_(logits)
        self.begin_at(held, start, length - held)

    def begin_at(self, length: int, start: Tensor, dropped: int = 0) -> None:
        """Go on after the `length` tokens in the caches, of which start[b] are padding, and after
        as many as a stream has dropped.
        """
        self.start.copy_(start - dropped)
        self.length.fill_(length - 1)
        if self.rolling:
            self.rolling.begin(length, dropped)

    def select(self) -> None:
        """Take the next token from the logits of the prompt or of the last step."""
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
        what `prepare` captured, and only launched.
        """
        if self.rolling:
            self.rolling.before_step(self.length, self.start)
        if self.device.type != "cuda":
            self._run(select)
            return
        self._graphs[select, self.sampler][0].replay()

    def _run(self, select: bool) -> None:
        if select:  # first: the kernels from here on overlap, torch's with none
            self._draw()
        for launch in self._launches:
            launch()
        if select:
            self._select()

    def _kernels(self) -> Iterator[Kernel]:
        """The step, but for the selection."""
        spec, residual = self._step_spec, self._residual
        options: dict[str, Any] = {"backend": self.backend}
        stack = Stack.of(spec, self.keys, self.values, self.backend) if self.batch == 1 else None
        if self.rolling and self.rolling.stream.sinks:
            # Before the embedding, which lets no kernel start that could read the cache too soon.
            yield Kernel("sinks", self.rolling.kernel(self.length, self.start, self.backend))
        if stack:
            run = partial(stack.run, residual, self.token, self.length, self.start)
            yield Kernel("embed, layers", run, stack.weights)
        else:
            embed = partial(
                ops.decode_embed, residual, self.token, spec.embedding, spec.positions, self.length,
                self.start, scale=spec.embedding_scale, **options,
            )  # fmt: skip
            yield Kernel("embed", embed)
            for index, (layer, keys, values) in enumerate(
                zip(spec.layers, self.keys, self.values, strict=True)
            ):
                if spec.chained:
                    yield from self._chained_layer(index, layer, keys, values)
                else:
                    yield from self._layer(layer, keys, values)
        yield from self._head()

    def _head(self) -> Iterator[Kernel]:
        """The logits of the residual stream, or in a chained step of its row."""
        spec, logits = self._step_spec, self.logits
        options: dict[str, Any] = {"backend": self.backend}
        if spec.chained:
            head = partial(project, logits, self._row, spec.head, **options)
        else:
            head = partial(
                project, logits, self._residual, spec.head, norm=spec.final_norm, **options
            )
        yield Kernel("norm, head", head, spec.head.weights)
        if spec.logits_scale != 1 or spec.logits_softcap:
            scale = partial(_scale_, logits, spec.logits_scale, spec.logits_softcap)
            yield Kernel("scale and cap of the logits", scale)

    def _layer(self, layer: LayerSpec, keys: Tensor, values: Tensor) -> Iterator[Kernel]:
        residual = self._residual
        options: dict[str, Any] = {"backend": self.backend}
        middle = self._middles[_middle_rows(layer)]
        mlp_in = self._mlp_in(layer, residual, layer.mlp_norm)
        if layer.one_kernel:
            assert layer.attention_norm is not None
            assert layer.mlp_norm is not None
            both = partial(
                project_two, (self._qkv, middle), residual, (layer.qkv, layer.mlp_in),
                (layer.attention_norm, layer.mlp_norm), act=layer.act, **options,
            )  # fmt: skip
            weights = (*layer.qkv.weights, *layer.mlp_in.weights)
            yield Kernel("norms, QKV and MLP in, activation", both, weights)
        else:
            qkv = partial(
                project, self._qkv, residual, layer.qkv, norm=layer.attention_norm, **options
            )
            yield Kernel("norm, QKV", qkv, layer.qkv.weights)
        yield from self._attention(layer, keys, values)
        attended, out = self._attended.view(self.batch, -1), layer.attention_out
        if layer.parallel:
            if not layer.one_kernel:
                yield mlp_in
            both = partial(
                project_sum, residual, (attended, middle), (out, layer.mlp_out), **options
            )
            weights = (*out.weights, *layer.mlp_out.weights)
            yield Kernel("attention and MLP out, add", both, weights)
            return
        yield Kernel(
            "attention out, add",
            partial(project, residual, attended, out, epilogue="add", **options),
            out.weights,
        )
        yield mlp_in
        yield Kernel(
            "MLP out, add",
            partial(project, residual, middle, layer.mlp_out, epilogue="add", **options),
            layer.mlp_out.weights,
        )

    def _chained_layer(
        self, index: int, layer: LayerSpec, keys: Tensor, values: Tensor
    ) -> Iterator[Kernel]:
        """With a kernel of its own for every add and the norms around it."""
        layers, row, delta = self._step_spec.layers, self._row, self._delta
        options: dict[str, Any] = {"backend": self.backend}
        last = index + 1 == len(layers)
        following = self._step_spec.final_norm if last else layers[index + 1].attention_norm
        if index == 0:
            yield self._add_norm(None, layer.attention_norm)
        qkv, out, mlp_out = layer.qkv, layer.attention_out, layer.mlp_out
        yield Kernel("QKV", partial(project, self._qkv, row, qkv, **options), qkv.weights)
        yield from self._attention(layer, keys, values)
        attended, middle = self._attended.view(self.batch, -1), self._middles[_middle_rows(layer)]
        yield Kernel(
            "attention out", partial(project, delta, attended, out, **options), out.weights
        )
        yield self._add_norm(layer.attention_post_norm, layer.mlp_norm, delta)
        yield self._mlp_in(layer, row, None)
        yield Kernel(
            "MLP out", partial(project, delta, middle, mlp_out, **options), mlp_out.weights
        )
        yield self._add_norm(layer.mlp_post_norm, following, delta)

    def _add_norm(
        self, post: Norm | None, norm: Norm | None, delta: Tensor | None = None
    ) -> Kernel:
        """`delta`, under `post`, to the residual stream, and the row that `norm` makes of that."""
        known = post or norm
        eps, offset = (known.eps, known.offset) if known else (0.0, 0.0)
        run = partial(
            ops.decode_add_norm, self._row, self._residual, delta,
            delta_weight=post.weight if post else None, weight=norm.weight if norm else None,
            eps=eps, offset=offset, backend=self.backend,
        )  # fmt: skip
        return Kernel("norm, add, norm", run)

    def _mlp_in(self, layer: LayerSpec, x: Tensor, norm: Norm | None) -> Kernel:
        return Kernel(
            "norm, MLP in, activation",
            partial(
                project, self._middles[_middle_rows(layer)], x, layer.mlp_in, norm=norm,
                epilogue="gated" if layer.gated else "act", act=layer.act, backend=self.backend,
            ),
            layer.mlp_in.weights,
        )  # fmt: skip

    def _attention(self, layer: LayerSpec, keys: Tensor, values: Tensor) -> Iterator[Kernel]:
        """From q, k and v to what the heads have attended to."""
        spec, rotation = self._step_spec, layer.rotation
        if layer.q_norm is not None and layer.k_norm is not None:
            normalise = partial(
                ops.decode_head_norm, self._qkv, layer.q_norm.weight, layer.k_norm.weight,
                q_width=spec.num_heads * spec.head_dim, k_width=spec.num_kv_heads * spec.head_dim,
                eps=layer.q_norm.eps, offset=layer.q_norm.offset, backend=self.backend,
            )  # fmt: skip
            yield Kernel("norms of q and k", normalise)
        attention = partial(
            ops.decode_attention, self._attended, self._qkv, keys, values, self.length, self.start,
            scaling=layer.scaling, inv_freq=rotation.inv_freq if rotation else None,
            rope_scale=rotation.scale if rotation else 1.0, interleaved=spec.interleaved,
            window=self._window(layer), softcap=layer.softcap, backend=self.backend,
        )  # fmt: skip
        yield Kernel("rotary, cache, attention", attention)

    def _window(self, layer: LayerSpec) -> int:
        return self.stream.kept + 1 if self.stream else layer.window

    def _capture_step(self, select: bool) -> torch.cuda.CUDAGraph:
        """The step as a graph. It runs once uncaptured, on the first slot, to build what is built
        once; then the state is that of `begin` again.
        """
        self.length.zero_()
        with self.sampler.trial() if self.sampler else nullcontext():
            self._run(select)
        for state in (self.token, self.finished, self.step):
            state.zero_()
        self.length.fill_(-1)
        return self._capture(lambda: self._run(select))

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def out_of_memory(error: Exception) -> bool:
    """Whether torch or CUDA raised it for want of memory."""
    words = ("out of memory", "can't allocate memory")  # CUDA's, the CPU allocator's
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def _round_up(tokens: int) -> int:
    """Slots for that many tokens."""
    return -(-(tokens + EXTRA_STEPS) // CAPACITY_STEP) * CAPACITY_STEP


def _middle_rows(layer: LayerSpec) -> int:
    rows = [len(w) for w in layer.mlp_in.weights]
    return rows[0] if layer.gated else sum(rows)


def _scale_(logits: Tensor, scale: float, cap: float) -> None:
    """logits / scale, softly capped; in torch, a launch or three at the end of a step."""
    if scale != 1:
        logits.div_(scale)
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
