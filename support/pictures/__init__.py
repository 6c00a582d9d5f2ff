"""Picture files and their annotations: decoding, reading, converting; the synthetic birds."""
