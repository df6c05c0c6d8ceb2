"""Imported by a measuring child: registers an op that kills it."""

from measure_children import register_deadly_op

register_deadly_op()
