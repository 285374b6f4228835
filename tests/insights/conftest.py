"""Captum 0.8 has Insights, and Captum 0.9 does not: which tests run with which."""

import captum
import pytest


@pytest.fixture(scope="session")
def insights_config():
    """The page's list of methods and their arguments."""
    if not captum.__version__.startswith("0.8"):
        pytest.skip(f"Captum {captum.__version__} has no Insights: make captum-0.8")
    from captum.insights.attr_vis import config

    return config


@pytest.fixture
def registered(insights_config):
    """The page's list with our methods; afterwards it is as it was."""
    from captum_generic_attn import insights

    lists = insights_config.ATTRIBUTION_NAMES_TO_METHODS, insights_config.ATTRIBUTION_METHOD_CONFIG
    before = [dict(entries) for entries in lists]
    insights.register()
    yield insights_config
    for entries, old in zip(lists, before, strict=True):
        entries.clear()
        entries.update(old)
