import pytest
import torch

from collavo.device import device_name, resolve_device
from collavo.errors import UserError


def test_auto_is_cuda_where_there_is_any_and_else_the_cpu():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_name(resolve_device("cpu")) == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:one", "CUDA", "mps", ""])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=rf"^cuda:99: .* finds {torch.cuda.device_count()} CUDA devices"):
        resolve_device("cuda:99")
