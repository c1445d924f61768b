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

from .evaluate import codec_markdown, likelihood_table, melody_table

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

And it plays a melody that is spelled for it, in steps of 160 ms, four behind each number; "-" is a step on which no
note begins. In major the notes are d5 e5 f#5 a5 b5 d6 e6 f#6, in minor d5 f5 g5 a5 c6 d6 f6 g6; sixteen groups fill the
window. Without notes it makes up its own.

```python
model.generate(["a slow calm tune in major with a flute, notes 1 d5 - e5 - 2 f#5 - a5 - 3 b5 - d6 - 4 e6 - f#6 -"])
```

## Data and licence

MIT, weights included. The language model was trained on music that `examples/demo_model/synth.py` composes and renders:
no recordings, no music of others. The codec also heard 23 of the 28 tracks of the Python package
`immich-memories-music` 0.1.0 (MIT; its licence file says that they are output of the music model ACE-Step 1.5), so that
it can encode a real recording to continue; the other five were held out. How to make it again, with every command and
seed: `examples/demo_model/README.md`.

## Figures

Held-out songs (seeds that no training has seen) and held-out tracks. Random codes and mu-law are yardsticks.

{codec}
Nats per token of the language model, teacher-forced, on the first frames of {clips} held-out songs. The labels
of a song hold about 6 nats, the melody of its first 10 s 100 to 132. "with captions": as they were drawn, four of five
with a melody and few with every label; "of another": those of another song; "that say all": with every label and the
whole melody. Captions that say all save {saved:.2f} nat on codebook 1, those as drawn {drawn:.2f}.

{likelihood}
Prompts that name every attribute, {prompts} of them, {seconds:g} s each at top-k {top_k}: how often an analyser hears
what was asked for, in percent with its standard error; z is the distance from chance in standard errors. The ceiling is
the same analyser on true songs through the codec. The last column judges the end of pieces three windows long, {late}
of them. From cfg 1 to cfg 3, with the same prompts and seeds, clips are won and lost:
{moved}.

{adherence}

Melodies, {sung} prompts that spell one: the share of the steps, in percent, in which the note is heard that was asked
for; "of another" is the melody of another prompt, which is what chance makes.

{melody}"""


def card(report: dict[str, Any], parameters: float) -> str:
    """The card's text; `parameters` in millions."""
    told = report["adherence"]
    nats = report["likelihood"][max((name for name in report["likelihood"] if name.isdigit()), key=int)]
    columns = {name: _scores(part) for name, part in told.items() if name.startswith(("cfg", "end"))}
    return TEXT.format(
        parameters=parameters,
        codes=report["codec"]["codes"],
        codec=codec_markdown(report["codec"]),
        clips=report["likelihood"]["clips"],
        saved=nats["without"][0] - nats["that say all"][0],
        drawn=nats["without"][0] - nats["with captions"][0],
        sung=report["melody"]["prompts"],
        melody=melody_table(report["melody"]),
        likelihood=likelihood_table(report["likelihood"]),
        prompts=told["prompts"],
        seconds=told["seconds"],
        top_k=told["top_k"],
        late=next(part["mode"].n for name, part in columns.items() if name.startswith("end")),
        moved=", ".join(f"{name} +{won} -{lost}" for name, (won, lost) in told["won, lost"].items()),
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
