"""Publishing: repositories, model cards, extraction of adapters, export, and verification of published figures."""
