"""A base model's settings refuse what can't be meant, and every risk is off unless it is set."""

import pytest

from lorasweep.config.compose import compose_run, packaged_folder


@pytest.mark.parametrize("method", ["full", "head", "bitfit", "intrinsic"])
def test_a_method_that_trains_weights_of_the_base_needs_them_unquantised(method):
    settings = {"model.quantization": "nf4", "method": method}
    with pytest.raises(ValueError, match=rf"`model.quantization` must be none with `method={method}`.* got 'nf4'"):
        compose_run(settings)
    assert compose_run({**settings, "method": "frozen"}).model.quantization == "nf4"


@pytest.mark.parametrize("file", sorted((packaged_folder("conf") / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_no_model_of_conf_allows_a_risk(file):
    given = {"model.path": "owner/name"} if file.stem in ("causal_lm", "classifier") else {}
    config = compose_run({"model": file.stem, **given}).model
    assert config.name == file.stem
    assert not config.trust_remote_code
