"""Model cards, lineage, and pushing to the Hub."""

from rlhf.hub.cards import write_card
from rlhf.hub.lineage import public_base, public_value
from rlhf.hub.pushing import PushRequest, prepare_repo, push_dataset, push_model, take_push_request

__all__ = [
    "PushRequest",
    "prepare_repo",
    "public_base",
    "public_value",
    "push_dataset",
    "push_model",
    "take_push_request",
    "write_card",
]
