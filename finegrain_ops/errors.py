"""The exceptions that finegrain_ops raises beyond ValueError and TypeError."""


class UnsupportedInputError(NotImplementedError):
    """The requested backend cannot run these inputs; the message lists every reason."""


class UnsupportedModelError(NotImplementedError):
    """`patch` found nothing in this model that it knows how to patch."""
