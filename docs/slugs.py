"""Anchors of headings, as Jupyter makes them, so that a link with one works there and on the site."""


def as_in_jupyter(title: str) -> str:
    "The heading with hyphens for spaces."
    return title.strip().replace(" ", "-")
