"""Exporters: a release in a trainer's own format. Each is one file; `FORMATS` names them."""
