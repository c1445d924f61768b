"""T5 ids against transformers' T5Tokenizer on the released vocabulary; states against T5EncoderModel."""

from __future__ import annotations

import json
import random
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

from musicgen_fast.conditioning import text as text_module
from musicgen_fast.conditioning.text import TextEncoder, TextTokenizer
from musicgen_fast.errors import CheckpointError

SENTENCE = "80s pop track with bassy drums and synth"
SENTENCE_IDS = [2775, 7, 2783, 1463, 28, 7981, 63, 5253, 7, 11, 13353, 1]
SPECIAL = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "</s", "<EXTRA_id_1>"]
BLANKS = [" ", "  ", "\t", "\n", "\u00a0", "\u0085", "\u1680", "\u2028", "\u200b", "\u3000", "\ufeff"]
# compatibility forms, and combining marks behind them, which normalizers may take one by one or as one cluster
FORMS = [*"ﬁ①Ⅷ㎏ｱﾞ½℃…™Å가각ᾅｆｕｌｌ", "e\u0301", "n\u0303", "\u0345", "\u0323\u0302"]


# -- the tokenizer --------------------------------------------------------------------------------------------------


def _vocabulary(name: str) -> Path:
    """T5's vocabulary file inside the diffsynth wheel, which is only looked at, never imported."""
    try:
        files = metadata.files("diffsynth") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.as_posix().endswith(f"flux/tokenizer_2/{name}")]
    if not found or not found[0].is_file():
        pytest.skip("T5's vocabulary is not here: pip install --no-deps diffsynth==1.1.9 brings it")
    return found[0]


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiece")
    shutil.copy(_vocabulary("spiece.model"), folder)
    return folder


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    shutil.copy(_vocabulary("tokenizer.json"), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(spiece_folder, json_folder):
    return TextTokenizer.load(spiece_folder), TextTokenizer.load(json_folder)


def _t5_tokenizer():
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("ids are those of transformers 5; T5Tokenizer of transformers 4 breaks ties as SentencePiece does")
    return transformers.T5Tokenizer


@pytest.fixture(scope="module")
def reference(spiece_folder):
    return _t5_tokenizer().from_pretrained(str(spiece_folder))


def _strings(kind: str, count: int) -> list[str]:
    rng = random.Random(f"strings of {kind}")

    def pick(choices, most):
        return "".join(rng.choice(choices) for _ in range(rng.randint(0, most)))

    def one() -> str:
        if kind == "repeated":
            return pick("abdhe!?. 019-_=", 3) * rng.randint(1, 40)
        if kind == "special":
            return pick(SPECIAL + BLANKS + ["a", "word", "▁", "<"], 12)
        if kind == "blanks":
            return pick(BLANKS + ["a", "b1", "好", "▁"], 25)
        if kind == "forms":
            return pick(FORMS + [" ", "a"], 25)
        ranges = {
            "ascii": [(32, 126)],
            "unicode": [(1, 0xD7FF), (0xE000, 0xFFFF)],
            "emoji and CJK": [(0x1F300, 0x1FAFF), (0x4E00, 0x9FFF), (97, 122), (0x200D, 0x200D), (0xFE0F, 0xFE0F)],
        }[kind]
        return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))

    return [one() for _ in range(count)]


@pytest.mark.parametrize("kind", ["ascii", "unicode", "emoji and CJK", "repeated", "blanks", "forms", "special"])
def test_ids_equal_those_of_transformers(kind, tokenizers, reference):
    for text in _strings(kind, 700):
        expected = reference(text).input_ids
        for tokenizer in tokenizers:
            assert tokenizer.ids(text) == expected, ascii(text)


def test_every_character_of_the_basic_plane(tokenizers, reference):
    characters = [chr(c) for c in range(1, 0x10000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 64):
        text = "a".join(characters[start : start + 64])
        assert tokenizers[0].ids(text) == reference(text).input_ids, hex(ord(characters[start]))


def test_known_ids(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.ids(SENTENCE) == SENTENCE_IDS
        assert tokenizer.ids("") == [1]
        assert tokenizer.ids(" \n") == [1]
        assert tokenizer.ids("a</s> b") == [3, 9, 1, 3, 115, 1]
        assert tokenizer.ids("<extra_id_0><extra_id_99>") == [32099, 32000, 1]
        assert tokenizer.vocab_size == 32100


def test_long_texts_are_not_cut(tokenizers):
    assert len(tokenizers[0].ids("drums " * 3000)) > 3000


def test_vocabularies_that_are_not_there_or_not_right(tmp_path, spiece_folder):
    with pytest.raises(CheckpointError, match=r"spiece\.model and tokenizer\.json.*text_encoder=") as caught:
        TextTokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    content = (spiece_folder / "spiece.model").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:d60acb12\nsize 791656\n"
    cuts = [content[:length] for length in (0, 1, 1000, 1001, len(content) // 2, len(content) - 100)]
    for broken in (*cuts, pointer, b"\xff" * 100):
        (tmp_path / "spiece.model").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"spiece\.model cannot be read"):
            TextTokenizer.load(tmp_path)
    (tmp_path / "spiece.model").unlink()
    for wrong in ('{"model": {"type": "BPE", "vocab": {}}}', '{"model": {"vocab": [["<s>", 0.0]]}}', "{}", "{"):
        (tmp_path / "tokenizer.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            TextTokenizer.load(tmp_path)


# -- the encoder ----------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
TEXTS = ["slow piano", "a", "fast drums and a very long bass line", " "]


@pytest.fixture
def letter_folder(tmp_path):
    """A folder with a vocabulary of single letters."""
    content = {"model": {"type": "Unigram", "unk_id": 2, "vocab": PIECES}, "normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=len(PIECES) + 3, d_model=24, d_kv=8, d_ff=32, num_layers=3, num_heads=3)
    model = T5EncoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # away from the near-linear regime of a fresh network
    return model


def _weights(t5, embedding="shared.weight"):
    weights = {n: w.clone() for n, w in t5.state_dict().items() if "embed_tokens" not in n and n != "shared.weight"}
    return weights | {embedding: t5.shared.weight.detach().clone()}


def _encoder(t5, folder, **changes):
    return TextEncoder.from_weights(t5.config.to_dict(), _weights(t5) | changes, folder)


def test_letters_vocabulary_agrees_with_transformers(letter_folder):
    reference = _t5_tokenizer()(vocab=PIECES, extra_ids=0)
    tokenizer = TextTokenizer.load(letter_folder)
    for text in [*TEXTS, "AbC 12 好x", "</s>a"]:
        assert tokenizer.ids(text) == reference(text).input_ids


def test_what_is_not_a_text(letter_folder):
    tokenizer = TextTokenizer.load(letter_folder)
    with pytest.raises(TypeError, match="must be a str, got list"):
        tokenizer.ids(["slow piano"])
    with pytest.raises(ValueError, match="surrogate pair at character 2"):
        tokenizer.ids("ab\ud83e")


def test_states_equal_those_of_a_padded_batch(t5, letter_folder):
    encoder = _encoder(t5, letter_folder)
    ids = [encoder.tokenizer.ids(text) for text in TEXTS]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        expected = t5(input_ids=padded, attention_mask=mask).last_hidden_state
    for text, row, states in zip(TEXTS, ids, expected, strict=True):
        actual = encoder.encode(text)
        assert actual.shape == (len(row), 24) and actual.dtype == torch.float32 and not actual.requires_grad
        torch.testing.assert_close(actual, states[: len(row)], rtol=1e-5, atol=1e-5)
    assert encoder.dim == 24


def test_only_the_empty_text_is_null(t5, letter_folder):
    encoder = _encoder(t5, letter_folder)
    assert encoder.encode("") is None and encoder.encode(None) is None
    assert encoder.encode(" ").shape == (1, 24)
    assert encoder.encode(" ").abs().max() > 0


def test_weights_of_either_name_and_any_dtype(t5, letter_folder):
    expected = _encoder(t5, letter_folder).encode("slow piano")
    other = TextEncoder.from_weights(t5.config.to_dict(), _weights(t5, "encoder.embed_tokens.weight"), letter_folder)
    assert torch.equal(other.encode("slow piano"), expected)
    assert other.model.shared.weight.data_ptr() == other.model.encoder.embed_tokens.weight.data_ptr()
    half = {name: weight.half() for name, weight in _weights(t5).items()}
    rounded = {name: weight.float() for name, weight in half.items()}
    states = _encoder(t5, letter_folder, **half).encode("slow piano")
    assert states.dtype == torch.float32 and not torch.equal(states, expected)
    assert torch.equal(states, _encoder(t5, letter_folder, **rounded).encode("slow piano"))


def test_building_draws_no_random_numbers(t5, letter_folder):
    before = torch.get_rng_state()
    encoder = _encoder(t5, letter_folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in [*encoder.model.parameters(), *encoder.model.buffers()])


def test_weights_that_do_not_fit_are_named(t5, letter_folder):
    first = "encoder.block.0.layer.0.SelfAttention.q.weight"
    weights = _weights(t5)
    del weights[first], weights["shared.weight"]
    with pytest.raises(CheckpointError, match="missing: encoder.block.0.layer.0.SelfAttention.q.weight, .*shared"):
        TextEncoder.from_weights(t5.config.to_dict(), weights, letter_folder)
    with pytest.raises(CheckpointError, match="unknown: decoder.weight"):
        _encoder(t5, letter_folder, **{"decoder.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"of another shape: {first}"):
        _encoder(t5, letter_folder, **{first: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="'bert'; only T5"):
        TextEncoder.from_weights({"model_type": "bert"}, _weights(t5), letter_folder)
    (letter_folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no T5 vocabulary"):
        _encoder(t5, letter_folder)


def test_texts_are_encoded_once_and_forgotten_in_order(t5, letter_folder, monkeypatch):
    encoder = _encoder(t5, letter_folder)
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    first = encoder.encode("a b")
    assert encoder.encode("a b") is first and len(calls) == 1
    monkeypatch.setattr(text_module, "_CACHED_TEXTS", 2)
    encoder.encode("c")
    encoder.encode("a b")  # now the younger of the two
    encoder.encode("d")
    assert len(calls) == 3 and encoder.encode("a b") is first and len(calls) == 3
    encoder.encode("c")
    assert len(calls) == 4
    monkeypatch.setattr(text_module, "_CACHED_ROWS", 5)
    long = encoder.encode("longer than five rows")
    assert len(long) > 5 and len(encoder._cache) == 0
