"""The plain twins: every architecture in torch alone, to be read and compared with."""
