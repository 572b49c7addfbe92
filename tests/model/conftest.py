import pytest
from each_model import MODELS


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param
