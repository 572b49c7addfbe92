"""What goes to the Hub: cards (`card`, with its `templates`), and uploads while a run goes on (`push`)."""

from .card import EXPORTS, classifier_card, export_card, short_name, update_card, write_card


__all__ = ["EXPORTS", "classifier_card", "export_card", "short_name", "update_card", "write_card"]
