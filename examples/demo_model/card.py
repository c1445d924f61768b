"""The demo model's card from its evaluation: `python -m examples.demo_model.card REPORT OUT/README.md`.

REPORT is what `evaluate` wrote. The figures stand in the card as they were measured; nothing is computed here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musicgen_fast.evaluation import Score, markdown_table

from .evaluate import codec_markdown, likelihood_table

TEXT = """---
license: mit
pipeline_tag: text-to-audio
tags: [musicgen, chiptune]
---

# The demo model

A MusicGen of {parameters:.1f} million parameters that plays chip-tune, bells, flutes and drums after a prompt: 16 kHz
mono, 50 frames a second, 4 codebooks of {codes}, a window of 10 s. It comes with musicgen_fast, so that there is
something to hear and to measure where no weights can be downloaded.

```python
from musicgen_fast import MusicGen

model = MusicGen.get_pretrained("demo")
model.set_generation_params(duration=8, top_k=100)
wav = model.generate(["a slow sad tune in minor with bells and no drums"], seed=1)
```

transformers' `MusicgenForConditionalGeneration.from_pretrained` loads this folder too and gives the same tokens. The
weights are float16, computed in float32.

## What it knows

The words of its captions: tempo (slow, medium, fast), major and minor, moods, dark and bright, soft and loud, sparse
and dense, a square wave, bells or a flute, rock drums, a dance beat or no drums. Nothing else: no voices, no guitars,
no genres. What other words do is chance.

## Data and licence

MIT, weights included. The language model was trained on music that `examples/demo_model/synth.py` composes and renders:
no recordings, no music of others. The codec also heard 23 of the 28 tracks of the Python package
`immich-memories-music` 0.1.0 (MIT; its licence file says that they are output of the music model ACE-Step 1.5), so that
it can encode a real recording to continue; the other five were held out. How to make it again, with every command and
seed: `examples/demo_model/README.md`.

## Figures

Held-out songs (seeds that no training has seen) and held-out tracks. Random codes and mu-law are yardsticks.

{codec}
Nats per token of the language model, teacher-forced, on the first frames of {clips} held-out songs. A caption holds
about 6 nats (three tempi, two modes, three instruments, drums, ...), however long the song: what it can save per token
shrinks with the length. "of another" is the caption of another song, "that say all" names every label.

{likelihood}
Prompts that name every attribute, {prompts} of them, {seconds:g} s each at top-k {top_k}: how often an analyser hears
what was asked for, in percent with its standard error; z is the distance from chance in standard errors. The ceiling is
the same analyser on true songs through the codec. The last column judges the end of pieces three windows long.

{adherence}
"""


def card(report: dict[str, Any], parameters: float) -> str:
    """The card's text; `parameters` in millions."""
    told = report["adherence"]
    columns = {name: _scores(part) for name, part in told.items() if name.startswith(("cfg", "end"))}
    return TEXT.format(
        parameters=parameters,
        codes=report["codec"]["codes"],
        codec=codec_markdown(report["codec"]),
        clips=report["likelihood"]["clips"],
        likelihood=likelihood_table(report["likelihood"]),
        prompts=told["prompts"],
        seconds=told["seconds"],
        top_k=told["top_k"],
        adherence=markdown_table(columns, _scores(told["ceiling"])).rstrip("\n"),
    )


def _scores(found: dict[str, dict[str, float]]) -> dict[str, Score]:
    return {name: Score(int(s["n"]), int(s["hits"]), s["chance"]) for name, s in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_model.card", description="Write the demo model's card from its evaluation."
    )
    parser.add_argument("report", type=Path, help="JSON of `evaluate`")
    parser.add_argument("out", type=Path, help="README.md in the folder of the model")
    args = parser.parse_args(argv)
    from safetensors import safe_open

    with safe_open(args.out.parent / "model.safetensors", "pt") as file:
        # A codebook lies there twice: the second one is for training it further.
        names = [name for name in file.keys() if "embed_avg" not in name]
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    text = card(json.loads(args.report.read_text(encoding="utf-8")), parameters / 1e6)
    args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
