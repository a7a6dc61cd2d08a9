"""StreamingCache: what a forward of everything, with positions within the cache, answers."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from helpers import LOW, name_of
from models import FAMILY, GPT2, GPT_NEOX, LLAMA, Case, cases, heads_of_16, padded, tokens_for
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_fuse
from hf_fuse import StreamingCache
from hf_fuse.decode.loop import engine_of
from hf_fuse.modules import CACHE, state_of

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
SINKS, WINDOW, NEW = 4, 24, 60
NO_WINDOWS = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
ROTARY = (LLAMA, GPT_NEOX)
pytestmark = pytest.mark.usefixtures("one_thread")
OTHERS = tuple(
    Case(c.id, c.model_type, {**c.changes, **NO_WINDOWS})
    for c in FAMILY
    # Gemma's layers always have windows; not all of SmolLM 3's are rotated as the reference does.
    if c.model_type not in ("gemma2", "gemma3_text", "smollm3", "phi3")
)


def generate(model: PreTrainedModel, ids: Tensor, new: int, cache: Any, **options: Any) -> Any:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        **{**GREEDY, CACHE: cache, **options},
    )


def reference_logits(
    model: PreTrainedModel,
    ids: Tensor,
    chunks: list[int],
    sinks: int,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    """Of all tokens at once: keys that are not rotated, and for every token the ones it attends to,
    rotated for 0, 1, 2 and so on. chunks: where tokens that came together begin.
    """
    inv_freq = model.base_model.rotary_emb.inv_freq.double()
    tokens = torch.arange(ids.shape[1], device=ids.device)
    began = torch.tensor(chunks, device=ids.device)
    began = began[torch.searchsorted(began, tokens, right=True) - 1][:, None]
    kept = (tokens < sinks) | (tokens > began - window)
    kept &= tokens <= tokens[:, None]
    places = kept.cumsum(-1) - 1  # within the cache, for each token's attention
    angles = (places.diagonal()[:, None] - places)[..., None] * inv_freq

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        half, group = angles.shape[-1], query.shape[1] // key.shape[1]
        sizes = [half, half, query.shape[-1] - 2 * half]
        q1, q2, q = query.double()[:, :, :, None].split(sizes, -1)
        key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
        k1, k2, k = key[:, :, None].split(sizes, -1)
        scores = ((q1 * k1 + q2 * k2) * angles.cos()).sum(-1) + (q * k).sum(-1)
        scores = (scores + ((q1 * k2 - q2 * k1) * angles.sin()).sum(-1)) * module.scaling
        weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).to(query.dtype), None

    modeling = importlib.import_module(type(model).__mro__[0].__module__)
    monkeypatch.setattr(modeling, "eager_attention_forward", attention)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
    monkeypatch.undo()
    return logits


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        pytest.param(case, prompt, id=f"{case.id}-prompt_{prompt}")
        for case in (*ROTARY, *OTHERS)
        for prompt in ((1, 19, 60) if case in ROTARY else (19,))
    ],
)
def test_greedy_tokens_are_those_of_positions_within_the_cache(
    case: Case, prompt: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A prompt longer than sinks and window attends in full."""
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 2, prompt)
    cache = StreamingCache(model, SINKS, WINDOW)
    out = generate(model, ids, NEW, cache, return_dict_in_generate=True, output_logits=True)
    chunks = [0, *range(prompt, prompt + NEW)]
    expected = reference_logits(model, out.sequences, chunks, SINKS, WINDOW, monkeypatch)
    expected = expected[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-3, atol=1e-3)
    assert out.sequences[:, prompt:].tolist() == expected.argmax(-1).tolist()
    assert cache.get_seq_length() == prompt + NEW - 1
    assert {layer.keys.shape[2] for layer in cache.layers} == {SINKS + WINDOW - 1}


@cases(ROTARY)
@pytest.mark.parametrize(("sinks", "window"), [(0, 16), (1, 1), (6, 16)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_attend_to_what_was_kept(
    case: Case,
    sinks: int,
    window: int,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    model = heads_of_16(case).build(device=device, attention=attention)
    ids = tokens_for(model, 2, 80)
    chunks = [0, 3, 4, 5, 25, 26, 60, 61, 62]
    cache = StreamingCache(model.config, sinks, window)
    with torch.no_grad():
        parts = [
            model(input_ids=ids[:, a:b], **{CACHE: cache}).logits
            for a, b in zip(chunks, [*chunks[1:], 80], strict=True)
        ]
    expected = reference_logits(model, ids, chunks, sinks, window, monkeypatch)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-3)


@cases(ROTARY)
def test_within_sinks_and_window_it_is_a_plain_cache(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 2, 10)
    plain = model.generate(input_ids=ids, max_new_tokens=SINKS + WINDOW - 9, **GREEDY)
    cache = StreamingCache(model, SINKS, WINDOW)
    assert generate(model, ids, SINKS + WINDOW - 9, cache).tolist() == plain.tolist()


def test_a_config_gives_the_models_frequencies(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    for a, b in zip(StreamingCache(model).layers, StreamingCache(model.config).layers, strict=True):
        assert a.inv_freq.tolist() == b.inv_freq.tolist()


def test_layers_without_rotary_positions_keep_their_keys() -> None:
    case = next(c for c in FAMILY if c.id == "smollm3")
    cache = StreamingCache(case.config(**NO_WINDOWS))
    assert [layer.inv_freq is None for layer in cache.layers] == [False, True, False]


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_sinks_are_rotated_once_whatever_the_length(dtype: torch.dtype, device: str) -> None:
    """The sinks at token 1000 are as far from their first keys as one rounding."""
    config = heads_of_16(LLAMA).config(num_hidden_layers=1)
    layer = StreamingCache(config, SINKS, 8).layers[0]
    keys = torch.randn(1, 2, 1000, 16, device=device).to(dtype)
    for token in range(1000):
        new = keys[:, :, token : token + 1]
        shown, _ = layer.update(new, new)
    assert torch.equal(layer.keys[:, :, :SINKS], keys[:, :, :SINKS])
    angles = (1000 - SINKS - 8) * layer.inv_freq.to(device).double()
    a, b = keys[:, :, :SINKS].double().chunk(2, -1)
    exact = torch.cat(
        [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
    )
    error = (shown[:, :, :SINKS].double() - exact).abs()
    assert float(error.max()) <= torch.finfo(dtype).eps / 2 * float(exact.abs().max())


@cases(ROTARY)
def test_a_second_call_continues_a_copied_or_pickled_cache(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 1, 9)
    whole = generate(model, ids, 80, StreamingCache(model, SINKS, WINDOW))
    cache = StreamingCache(model, SINKS, WINDOW)
    first = generate(model, ids, 50, cache)
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        assert generate(model, first, 30, again).tolist() == whole.tolist()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, ids, 80, cache).tolist() == whole.tolist()


@cases(ROTARY)
def test_beams_are_those_of_single_sequences(case: Case, device: str) -> None:
    """Two beams that the cache is reordered for."""
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 1, 9)
    out = generate(
        model, ids, 40, StreamingCache(model, SINKS, WINDOW), num_beams=3, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    cache, total = StreamingCache(model, SINKS, WINDOW), 0.0
    with torch.no_grad():
        logits = model(input_ids=ids, **{CACHE: cache}).logits[:, -1]
        for token in out.sequences[0, 9:].tolist():
            total += float(logits.log_softmax(-1)[0, token])
            new = torch.tensor([[token]], device=device)
            logits = model(input_ids=new, **{CACHE: cache}).logits[:, -1]
    assert total == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)


def on_engine(model: PreTrainedModel, new: int) -> bool:
    """Whether the last call's `new` tokens were selected by a step that streams."""
    with engine_of(model) as engine:
        streamed = engine is not None and engine.rolling is not None
        notes = [note for note in state_of(model).notes if note.startswith("generate")]
        return streamed and int(engine.step) >= new and not notes


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        pytest.param(case, prompt, id=f"{case.id}-prompt_{prompt}")
        for case in (*ROTARY, *OTHERS)
        for prompt in ((1, 300) if case in ROTARY else (1,))
    ],
)
def test_the_engine_gives_transformers_tokens(case: Case, prompt: int, device: str) -> None:
    """Through the buffers' 256 or 512 slots, and back to their front."""
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 2, prompt)
    new = 300
    caches = [StreamingCache(model, SINKS, WINDOW) for _ in range(2)]
    expected = generate(model, ids, new, caches[0])
    hf_fuse.patch(model, verify=False)
    assert generate(model, ids, new, caches[1]).tolist() == expected.tolist()
    assert on_engine(model, new)
    compare_caches(*caches)


def compare_caches(actual: StreamingCache, expected: StreamingCache) -> None:
    for a, b in zip(actual.layers, expected.layers, strict=True):
        assert a.seen == b.seen
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.values, b.values, rtol=1e-3, atol=1e-3)


@cases(ROTARY)
@pytest.mark.parametrize(("sinks", "window"), [(0, 24), (1, 1), (40, 200)], ids=str)
def test_the_engine_with_other_sinks_and_windows(
    case: Case, sinks: int, window: int, device: str
) -> None:
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 1, 30)
    caches = [StreamingCache(model, sinks, window) for _ in range(2)]
    expected = generate(model, ids, 600, caches[0])
    hf_fuse.patch(model, verify=False)
    assert generate(model, ids, 600, caches[1]).tolist() == expected.tolist()
    assert on_engine(model, 600)
    compare_caches(*caches)


@cases(ROTARY)
def test_positions_begin_anew(case: Case, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("hf_fuse.decode.rolling.FARTHEST", 300)
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 2, 9)
    caches = [StreamingCache(model, SINKS, WINDOW) for _ in range(2)]
    expected = generate(model, ids, 700, caches[0])
    hf_fuse.patch(model, verify=False)
    actual = generate(model, ids, 700, caches[1])
    assert actual.tolist() == expected.tolist()
    assert on_engine(model, 700)
    with engine_of(model) as engine:
        assert engine.rolling.rebased > 300
        assert int(engine.length - engine.start.min()) < 300 + engine.capacity
    compare_caches(*caches)


@cases(ROTARY)
@pytest.mark.parametrize("calls", [(5, 22, 3, 40, 300), (1, 1, 1)], ids=str)
def test_the_engine_continues_a_cache(case: Case, calls: tuple[int, ...], device: str) -> None:
    """With the other's tokens, and some of the caller's between the calls."""
    model = heads_of_16(case).build(device=device)

    def answers(cache: StreamingCache) -> list[list[int]]:
        ids, found = tokens_for(model, 1, 6), []
        for new in calls:
            ids = generate(model, ids, new, cache)
            found.append(ids[0].tolist())
            ids = torch.cat([ids, tokens_for(model, 1, 2)], -1)
        return found

    expected = answers(StreamingCache(model, SINKS, WINDOW))
    hf_fuse.patch(model, verify=False)
    assert answers(StreamingCache(model, SINKS, WINDOW)) == expected
    assert on_engine(model, calls[-1])


def test_a_cache_goes_to_the_engine_and_back(device: str) -> None:
    """Half of the text by transformers, half by the engine, each on the other's cache."""
    model = heads_of_16(LLAMA).build(device=device)
    ids = tokens_for(model, 2, 6)
    whole = generate(model, ids, 400, StreamingCache(model, SINKS, WINDOW))
    cache = StreamingCache(model, SINKS, WINDOW)
    for first in (True, False):
        for new in (100, 100):
            with hf_fuse.patched(model) if first else hf_fuse.patched(model, ops={"rotary"}):
                ids = generate(model, ids, new, cache)
    assert ids.tolist() == whole.tolist()


@cases(ROTARY)
def test_sequences_that_end_before_leave_the_cache_right(case: Case, device: str) -> None:
    """On a GPU the engine is then a step further than what it hands back."""
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 1, 9)
    free = generate(model, ids, 60, StreamingCache(model, SINKS, WINDOW))[0, 9:].tolist()
    ends = [n for n in range(10, 60) if free[n] not in free[:n]]
    end = min(ends, key=lambda n: abs(n - 18), default=None)
    assert end is not None
    caches = [StreamingCache(model, SINKS, WINDOW) for _ in range(2)]
    expected = generate(model, ids, 60, caches[0], eos_token_id=free[end])
    hf_fuse.patch(model, verify=False)
    actual = generate(model, ids, 60, caches[1], eos_token_id=free[end])
    assert actual.tolist() == expected.tolist()
    assert actual.shape[1] == 9 + end + 1
    compare_caches(*caches)


def test_sampling_gives_the_unpatched_models_tokens(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids, found = tokens_for(model, 2, 9), []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model, verify=False)
        torch.manual_seed(3)
        cache = StreamingCache(model, SINKS, WINDOW)
        found.append(generate(model, ids, 80, cache, do_sample=True, top_k=20).tolist())
    assert found[0] == found[1]
    assert on_engine(model, 79)  # on a CPU the last one is not put


def test_the_engine_is_built_once_for_a_window(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    hf_fuse.patch(model, verify=False)
    engines = []
    for window, new in ((24, 200), (24, 20), (24, 700), (30, 20)):
        generate(model, tokens_for(model, 1, 9), new, StreamingCache(model, SINKS, window))
        with engine_of(model) as engine:
            engines.append(engine)
    plain = model.generate(input_ids=tokens_for(model, 1, 9), max_new_tokens=20, **GREEDY)
    hf_fuse.unpatch(model)
    again = model.generate(input_ids=tokens_for(model, 1, 9), max_new_tokens=20, **GREEDY)
    assert plain.tolist() == again.tolist()
    assert engines[0] is engines[1]
    assert len({id(e) for e in engines}) == 3  # more steps, another window
    assert {e.capacity for e in engines} == {256}


def test_padding_is_refused(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    hf_fuse.patch(model, verify=False)
    inputs = padded(tokens_for(model, 2, 9), "left")
    with pytest.raises(ValueError, match="StreamingCache takes no padding"):
        model.generate(**inputs, max_new_tokens=5, **{CACHE: StreamingCache(model)}, **GREEDY)


REFUSED: dict[str, tuple[Any, str]] = {
    "learned_positions": (GPT2.config(), "gpt2 has learned positions; known .*gpt_neox"),
    "unknown": (
        type("Other", (LlamaConfig,), {"model_type": "other"})(),
        "other is not known; known .*llama",
    ),
    "sliding": (
        next(c for c in FAMILY if c.id == "mistral").config(),
        "mistral model has layers with a sliding window",
    ),
    "phi3": (
        next(c for c in FAMILY if c.id == "phi3").config(),
        "transformers' generate drops any cache of a phi3 model",
    ),
    "dynamic": (
        LLAMA.config(
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        ),
        "rope_type 'dynamic' changes its frequencies",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stream_is_refused_in_one_line(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(hf_fuse.UnsupportedModelError, match=message) as error:
        StreamingCache(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("sinks", "window"), [(-1, 8), (4, 0)])
def test_counts_that_make_no_sense_are_refused(sinks: int, window: int) -> None:
    with pytest.raises(ValueError, match="sinks must be at least 0 and window at least 1"):
        StreamingCache(LLAMA.config(), sinks, window)


def test_cropping_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cropped"):
        StreamingCache(LLAMA.config()).crop(-1)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a transformers config or model, got str"):
        StreamingCache("llama")
    with pytest.raises(TypeError, match="got Linear"):
        StreamingCache(torch.nn.Linear(1, 1))
    assert StreamingCache(LlamaForCausalLM(LLAMA.config())).window == 1024
