"""One module a wire: how a canonical request is written, and an answer read. No input or output happens here."""
