"""One deployment for all end-to-end tests: a real Redis, both services as processes, two tenants, random weights."""

import pytest
import torch
from e2e_support import START_DEADLINE_S, TOKENS, Caller, draw, image_file
from example_support import prepare_go, prepare_node
from safetensors.torch import save_file

from splitsam.client import Client
from splitsam.client.stack import Stack, StackSettings
from splitsam.common.architectures import ARCHITECTURES, build_sam
from splitsam.v1 import encoder_pb2

# Of decoders whose masks of `photo` are neither empty nor full, in whatever precision it is encoded.
_SEEDS = {"vit_t": 1, "vit_b": 253, "vit_l": 364, "vit_h": 297}


def _random_sam(model, seed):
    """Seeded weights, positions and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sam = build_sam(ARCHITECTURES[model]).requires_grad_(False)
        for parameter in sam.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return sam


def _write_weights(path, seed, model="vit_t"):
    """Random weights whose masks are less noisy and logits larger; the seed is the decoder's."""
    sam = _random_sam("vit_t", seed)
    if model != "vit_t":
        sam.image_encoder = _random_sam(model, seed=1).image_encoder
    for upscaling in (sam.mask_decoder.output_upscaling[0], sam.mask_decoder.output_upscaling[3]):
        upscaling.weight.lerp_(upscaling.weight.mean((2, 3), keepdim=True), 0.8)
    for mlp in sam.mask_decoder.output_hypernetworks_mlps:
        mlp.layers[-1].weight.mul_(20)
        mlp.layers[-1].bias.mul_(20)
    save_file(sam.state_dict(), path)
    return path


def _is_encoder_chosen(config):
    return config.getoption("--precision") is not None or config.getoption("--model") != "vit_t"


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if config.getoption("--device") != "cpu":
        reasons["needs_slow_model"] = "a GPU serves the queue before it can be seen to wait"
    if config.getoption("--precision") not in (None, "fp32"):
        reasons["needs_fp32"] = "it compares numbers with those of segment-anything in fp32"
    if _is_encoder_chosen(config):
        reasons["own_services"] = "it starts services of its own, with another encoder than was asked for"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if _is_encoder_chosen(config):
            item.add_marker(pytest.mark.timeout(START_DEADLINE_S + 300))  # the first test waits for two encoders


@pytest.fixture(scope="session")
def model_name(pytestconfig):
    return pytestconfig.getoption("--model")


@pytest.fixture(scope="session")
def precision(pytestconfig, on_gpu):
    """What the encoders say that they compute in."""
    asked = pytestconfig.getoption("--precision") or "fp32"
    unmeasured = "bf16" if on_gpu else "fp32"
    return unmeasured if asked == "auto" else asked


@pytest.fixture(scope="session")
def weights(tmp_path_factory, model_name):
    path = _write_weights(tmp_path_factory.mktemp("weights") / "random.safetensors", _SEEDS[model_name], model_name)
    yield path
    path.unlink()  # up to 2.5 GB, and pytest keeps the folders of three runs


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory):
    return _write_weights(tmp_path_factory.mktemp("weights") / "other.safetensors", seed=3)


@pytest.fixture(scope="session")
def tenant_args(tmp_path_factory):
    """What makes a service tell tenants apart; the secret comes with the stack."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("".join(f"{tenant} {token}\n" for tenant, token in TOKENS.items()))
    return "--tokens-file", str(path)


@pytest.fixture(scope="session")
def device_args(pytestconfig):
    return "--device", pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def on_gpu(pytestconfig):
    return pytestconfig.getoption("--device") != "cpu"


@pytest.fixture(scope="session")
def precision_args(pytestconfig):
    """Of an encoder alone; each size of a batch is compiled by itself."""
    asked = pytestconfig.getoption("--precision")
    chosen = ("--precision", asked) if asked else ()
    return (*chosen, "--batch-sizes", "1,4") if _is_encoder_chosen(pytestconfig) else ()


@pytest.fixture(scope="session")
def service_args(weights, device_args, tenant_args):
    # On a busy machine the queue may take longer than its default bound.
    patience = ("--max-queue-ms", "120000", "--max-bulk-queue-ms", "120000")
    return "--checkpoint", str(weights), *device_args, *tenant_args, *patience


@pytest.fixture(scope="session")
def encoder_args(service_args, precision_args):
    # On a busy machine an encode may take longer than the default wait for another replica's.
    return *service_args, *precision_args, "--claim-wait-ms", "60000"


@pytest.fixture(scope="session")
def stack(service_args, encoder_args, tmp_path_factory):
    settings = StackSettings(
        encoder_args=encoder_args,
        decoder_args=(*service_args, "--predict-timeout-ms", "120000"),
        run_folder=tmp_path_factory.mktemp("stack"),
        start_timeout_s=START_DEADLINE_S,
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as running:
        yield running
        for name in ("encoder", "decoder"):
            assert "rpc failed" not in running.children[name].log_path.read_text()  # no test met a defect unseen


@pytest.fixture(scope="session")
def open_stack(weights, device_args, precision_args, tmp_path_factory):
    """A second deployment, without tenants, to stop parts of; its decoder keeps one embedding in memory."""
    arguments = ("--checkpoint", str(weights), *device_args, "--redis-timeout-ms", "500", "--max-queue-ms", "120000")
    settings = StackSettings(
        encoder_args=(*arguments, *precision_args),
        decoder_args=(*arguments, "--memory-bytes", str(4 * 4096 * 640)),
        gateway_port=0,
        run_folder=tmp_path_factory.mktemp("open-stack"),
        start_timeout_s=START_DEADLINE_S,
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as running:
        yield running


def _caller(stack, tenant):
    caller = Caller(stack.encoder, stack.decoder, TOKENS[tenant])
    yield caller
    caller.close()


@pytest.fixture(scope="session")
def alpha(stack):
    yield from _caller(stack, "alpha")


@pytest.fixture(scope="session")
def beta(stack):
    yield from _caller(stack, "beta")


@pytest.fixture(scope="session")
def client(stack):
    with Client(
        stack.encoder, stack.decoder, token=TOKENS["alpha"], encode_timeout_s=60, predict_timeout_s=60
    ) as open_:
        yield open_


@pytest.fixture(scope="session")
def model_id(alpha):
    return alpha.encoder.GetModelInfo(encoder_pb2.EncoderServiceGetModelInfoRequest(), **alpha.options()).model.model_id


@pytest.fixture(scope="session")
def photo():
    """A PNG of 320 x 240 pixels."""
    return image_file(draw(1))


@pytest.fixture(scope="session")
def encoded(alpha, photo):
    """What the tenant alpha was told of `photo`."""
    return alpha.encode(photo)


@pytest.fixture(scope="session")
def key(encoded):
    return encoded.embedding.embedding_key


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    return prepare_node(tmp_path_factory.mktemp("node") / "example")


@pytest.fixture(scope="session")
def go(tmp_path_factory):
    return prepare_go(tmp_path_factory.mktemp("go"))


@pytest.fixture(params=["node", "go"])
def example(request):
    """The example of each language that can be run here."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def where(stack, alpha, tmp_path):
    """The options that say where the services are and who asks."""
    (tmp_path / "token").write_text(alpha.token + "\n")
    return "--encoder", stack.encoder, "--decoder", stack.decoder, "--token-file", tmp_path / "token"


@pytest.fixture(autouse=True)
def _services_stay_alive(stack):
    """Whatever a test does to them, the processes that all tests share go on."""
    yield
    for child in stack.children.values():
        child.check_alive("running a test")


@pytest.fixture
def large_blocks_given_back(monkeypatch):
    """By glibc of the service, as soon as they are free, and to all threads of one heap: what is resident is held."""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", str(2**16))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**17))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
