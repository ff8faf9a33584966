"""The encoder service assembled: weights, model, batcher, cache and servicer."""

import asyncio
import logging

import grpc
import torch

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.checkpoints import LoadedModel, load_model
from splitsam.common.codecs import CODECS
from splitsam.common.device import choose_device, describe_device
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.keys import EncodingVersion
from splitsam.common.messages import ModelInfo
from splitsam.common.metrics import Metrics
from splitsam.common.priority import ENCODE_NICENESS
from splitsam.common.redis_figures import watch_redis
from splitsam.encoder_service import compile_cache
from splitsam.encoder_service.ahead_of_time import check_precision_of_file
from splitsam.encoder_service.calibration import Calibration, find_calibration, report_folders
from splitsam.encoder_service.jpeg_on_gpu import NVJPEG_VERSION, JpegDecoder
from splitsam.encoder_service.model import DeviceImage, EncoderImage, EncoderModel
from splitsam.encoder_service.pipeline import EncodePipeline
from splitsam.encoder_service.precision import check_precision, choose_precision, rungs_of
from splitsam.encoder_service.preprocess import PREPROCESS_VERSION, PreparedImage
from splitsam.encoder_service.servicer import EncoderServicer
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import encoder_pb2, encoder_pb2_grpc

log = logging.getLogger("splitsam.encoder")


class EncoderService:
    """One encoder process: `open` loads, `close` drains."""

    full_name = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].full_name
    large_requests = frozenset({"EncodeImage", "EncodeImages"})

    def __init__(self, settings: EncoderSettings, metrics: Metrics):
        self._settings = settings
        self._metrics = metrics
        self._keys = settings.key_ring()
        self._device = choose_device(settings.device)
        check_precision(settings.precision, self._device)  # before any weights are fetched
        self._jpegs = JpegDecoder(settings.image_limits(), self._device) if settings.jpeg_decoder == "nvjpeg" else None
        self._guard = DeviceGuard(self._device, metrics)
        self._servicer = EncoderServicer(settings)
        self._batcher: Batcher[EncoderImage, torch.Tensor] | None = None
        self._pipeline: EncodePipeline | None = None
        self._cache = RecordCache(
            settings.redis_address(),
            timeout_ms=settings.redis_timeout_ms,
            connections=settings.redis_connections,
            metrics=metrics,
        )
        self._watching: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]

    def check_room(self, method: str, tenant: str) -> None:
        if self._pipeline is not None and method == "EncodeImage":
            self._pipeline.check_room(tenant, Lane.CLICK)

    async def open(self) -> None:
        model, info = await asyncio.to_thread(self._load)
        self._metrics.model.labels(info.name, info.model_id, info.precision, info.device).set(1)
        on_gpu = self._device.type == "cuda"
        self._batcher = Batcher(
            self._guard.guarded_on_loop(model.encode_on_loop)
            if model.is_graphed
            else self._guard.guarded(model.encode),
            name="encoder",
            max_weight=max(self._settings.batch_sizes) if on_gpu else 1,
            max_wait_ms=self._settings.max_wait_ms if on_gpu else 0,
            max_queue=self._settings.max_queue,
            max_queue_ms=self._settings.lane_queue_ms,
            metrics=self._metrics,
            niceness=0 if on_gpu else ENCODE_NICENESS,
            at_once=2 if model.is_graphed else 1,
        )
        self._batcher.start()
        version = EncodingVersion(info.model_id, info.preprocess_version, info.precision, info.codec)

        def pin(image: PreparedImage) -> PreparedImage:
            with self._guard.watch():
                return model.pin(image)

        self._pipeline = EncodePipeline(
            self._batcher,
            self._cache,
            self._keys,
            version,
            self._settings,
            self._metrics,
            pin=pin,
            decode_on_device=self._decode_on_device,
        )
        self._pipeline.start()
        self._servicer.load(self._pipeline, info)
        self._watching = asyncio.create_task(watch_redis(self._cache, self._metrics))

    async def lost(self) -> str:
        return await self._guard.lost()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._pipeline is not None:
            await self._pipeline.close()
        if self._batcher is not None:
            await self._batcher.close()
        await self._cache.close()

    def _decode_on_device(self, image: bytes) -> DeviceImage | None:
        if self._jpegs is None:
            return None
        with self._guard.watch():
            return self._jpegs.prepare(image)

    def _load(self) -> tuple[EncoderModel, ModelInfo]:
        settings = self._settings
        loaded = load_model(
            model=settings.model,
            checkpoint=settings.checkpoint,
            sha256=settings.sha256,
            cache_dir=settings.cache_dir,
        )
        sam = loaded.sam
        choice = choose_precision(settings.precision, self._device, loaded.model_id, self._find_calibration(loaded))
        check_precision_of_file(loaded.optimisation, choice, self._device)
        log.info("precision", extra={"precision": choice.precision, "rungs": choice.rungs, "notes": choice.notes})
        model = EncoderModel(
            sam.image_encoder,
            sam.pixel_mean,
            sam.pixel_std,
            rungs=choice.rungs,
            device=self._device,
            batch_sizes=settings.batch_sizes if self._device.type == "cuda" else (),
            embedding_dtype=CODECS[settings.codec].dtype,
        )
        cache_notes = compile_cache.warm_up(model.warm_up)
        if self._jpegs is not None:
            self._jpegs.warm_up()
        info = ModelInfo(
            name=loaded.name,
            model_id=loaded.model_id,
            demonstration=loaded.demonstration,
            precision=choice.precision,
            device=describe_device(self._device),
            notes=(*loaded.notes, *choice.notes, *cache_notes),
            codec=settings.codec,
            preprocess_version=PREPROCESS_VERSION if self._jpegs is None else NVJPEG_VERSION,
        )
        return model, info

    def _find_calibration(self, loaded: LoadedModel) -> Calibration:
        if loaded.optimisation is not None and loaded.optimisation.images:
            return Calibration()  # reports are on weights pruned by magnitude, not on images
        folders = report_folders(loaded.path, self._settings.cache_dir)
        return find_calibration(loaded.model_id, self._device, rungs_of(self._device.type), folders)
