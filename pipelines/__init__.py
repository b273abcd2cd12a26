"""Beam jobs and their command lines; what a row says is decided in `collavo`, strung together here."""
