"""Settings of both services: environment, flags and the files that they name."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

from bench.fuzz.mutate import mutate
from bench.fuzz.target import Broken
from splitsam.common.auth import Authenticator
from splitsam.common.certificates import ServerCertificate
from splitsam.common.checkpoint_files import locate_checkpoint
from splitsam.common.device import choose_device
from splitsam.common.errors import CheckpointError
from splitsam.common.listeners import channel_options
from splitsam.common.metrics import Metrics
from splitsam.common.quotas import Quotas
from splitsam.common.redis_client import parse_place
from splitsam.common.settings import ServiceSettings, SettingsProblem
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.precision import check_precision
from splitsam.encoder_service.settings import EncoderSettings

_SERVICES: dict[str, type[ServiceSettings]] = {"encoder": EncoderSettings, "decoder": DecoderSettings}


def _words(text: str) -> list[str]:
    return text.split()


_NUMBERS = (
    *("", " 7 ", "9" * 30, "9" * 5000),
    *_words("0 -1 1 1.5 1e3 1e400 nan inf -inf 0x10 1_000 ٣ ٣٣ 65535 65536 2147483648 18446744073709551616"),
    *_words("true null None {} [] [1"),
)
_TEXTS = (
    *("cpu\n", "auto ", "\ud800", "\udcff", "a\nb", "a\r\nb", "\x1b[31m", "\u2028", "nonexistent\nfile"),
    *("x" * 300, "x" * 5000, "0" * 64, "fp32", "FP32", "json", "é", "1,2", "1,,2", ","),
    *_words("cpu cuda cuda:0 cuda:٣ cuda:03 cuda:99 cuda:99999999999999999999"),
    *("'", '"', "{", '{"a":'),
    *_words("--help -- - = / . .. ~ ~nobody /nonexistent ~nobody/a.pth nonexistent.pth"),
)
_URLS = _words("""
    redis://h redis://:hunter2@h:1/2 redis://h:99999 redis://[::1 redis://h/x redis://h?db=x redis://h?foo=1 REDIS://h
    redis://h?socket_timeout=x redis+sentinel://h redis+sentinel://h:x/m redis+sentinel://h/m?a=b unix:// redis:
    redis+cluster://a,b:1,, redis+cluster://h/1 rediss://h?ssl_cert_reqs=bad file:///x file://[ file://h:x/y
""")
_CONTENTS = (
    *("", "\n", "#\n", "tenant token-of-16-letters\n", "tenant 1 1\n", "tenant nan 1", "a b c d\n", "tenant 1e400 -1"),
    *("0123456789abcdef", "short", "redis://h:1", "http://:hunter2@h", "t \udcff\udcfe token-of-16-letters", "t 1 ٣"),
)
_FILE, _SEPARATOR = "@file=", "\0"
_PATH_SETTINGS = _words("""
    secret_file previous_secret_file tokens_file quotas_file redis_url_file tls_cert_file tls_key_file
    tls_client_ca_file checkpoint cache_dir
""")
_PARSED_FURTHER = _words("checkpoint sha256 device redis_url redis_url_file tokens_file quotas_file")


def make(random: Random) -> bytes:
    """The service, the content of a file, then flags and variables, as words with a zero byte between."""
    service = random.choice(tuple(_SERVICES))
    names = sorted(_SERVICES[service].model_fields) + 6 * _PARSED_FURTHER
    words = [service, _FILE + random.choice(_CONTENTS)]
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        name = random.choice(names)
        value = random.choice(random.choice((_NUMBERS, _TEXTS, _URLS, _CONTENTS)))
        if random.random() < 0.5:
            value = _FILE if name in _PATH_SETTINGS else str(_SERVICES[service].model_fields[name].default)
        variable = f"SPLITSAM_{service.upper()}_{name.upper()}"
        flag = "--" + name.replace("_", "-")
        words += random.choice(
            (
                [f"{variable}={value}"],
                [f"{variable.lower()}={value}"],
                [f"{variable}{random.choice(_TEXTS)}={value}"],
                [flag, value],
                [f"{flag}={value}"],
                [flag, value, flag, random.choice(_NUMBERS)],
                [flag],
                [f"--no-{flag[2:]}"],
                [value],
                [flag[: random.randrange(2, len(flag) + 1)], value],
            )
        )
    data = _SEPARATOR.join(words).encode(errors="surrogatepass")
    return mutate(random, data, [data]) if random.random() < 0.2 else data


def check(data: bytes) -> str:
    """Settings that a service could start with, or one line that names what is wrong."""
    service, *words = data.decode(errors="surrogateescape").split(_SEPARATOR)
    kind = _SERVICES.get(service, EncoderSettings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        content = next((word[len(_FILE) :] for word in words if word.startswith(_FILE)), "")
        path.write_bytes(content.encode(errors="surrogateescape"))
        words = [word.replace(_FILE, str(path)) for word in words if not word.startswith(_FILE)]
        variables = [word.split("=", 1) for word in words if word.upper().startswith("SPLITSAM_") and "=" in word]
        arguments = [word for word in words if not (word.upper().startswith("SPLITSAM_") and "=" in word)]
        with _environment(dict(variables)):
            return _load(kind, arguments)


def _load(kind: type[ServiceSettings], arguments: list[str]) -> str:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            settings = kind.load(arguments)
            _use(settings)
    except (SettingsProblem, CheckpointError) as error:
        _check_line(str(error), kind)
        return type(error).__name__
    except SystemExit as error:
        said = out.getvalue()
        if error.code == 0 and "usage:" in said:
            return "help"
        if error.code != 2 or "error: " not in said:
            raise Broken(f"ended with {error.code}, saying {said[-300:]!r}") from error
        return "usage"
    return "accepted"


def _use(settings: ServiceSettings) -> None:
    """What a service does with its settings before it listens; nothing is downloaded."""
    json.dumps(settings.for_log())
    settings.key_ring()
    parse_place(settings.redis_address())
    Authenticator(settings.tokens_file, Metrics())
    Quotas.from_settings(settings)
    device = choose_device(settings.device)
    if isinstance(settings, EncoderSettings):
        check_precision(settings.precision, device)
    ServerCertificate.of(settings, Metrics())
    if not all(-(2**31) <= value < 2**31 for _, value in channel_options(settings)):
        raise Broken(f"gRPC takes 32 bits: {channel_options(settings)}")
    if settings.checkpoint is not None and not settings.checkpoint.startswith("https:"):
        locate_checkpoint(settings.checkpoint, settings.sha256, settings.cache_dir)


def _check_line(text: str, kind: type[ServiceSettings]) -> None:
    words = {word.strip("_") for word in re.findall(r"[a-z0-9_]+", text.lower().replace("-", "_"))}
    is_named = words & set(kind.model_fields) or "setting" in text
    if len(text.splitlines()) != 1 or not is_named or len(text) > 10_000:
        raise Broken(f"not one line that names a setting: {text[:500]!r}")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    try:
        os.environ.update(variables)
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
