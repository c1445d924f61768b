"""The references that the tests compare with: the real audiocraft and transformers, on tiny random models, offline."""
