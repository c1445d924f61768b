"""musicgen_fast: MusicGen at the speed of the memory; the same API and the same tokens as audiocraft."""
