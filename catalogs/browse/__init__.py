"""A local web app to look at a catalog: filter, play, mark. See `serve`."""

from catalogs.browse.app import make_app, serve
from catalogs.browse.clip_index import Index, Result

__all__ = ["Index", "Result", "make_app", "serve"]
