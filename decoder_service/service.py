"""The decoder service assembled: weights, model, batcher, stores and servicer."""

import asyncio

import grpc
import numpy as np
import torch

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.checkpoints import load_model
from splitsam.common.device import choose_device, describe_device
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.messages import ModelInfo
from splitsam.common.metrics import Metrics
from splitsam.common.priority import CLICK_NICENESS
from splitsam.common.redis_figures import watch_redis
from splitsam.common.shapes import EMBEDDING_SHAPE, IMAGE_SIDE_PX, LOW_RES_SIDE_PX
from splitsam.decoder_service.cutting import Cut
from splitsam.decoder_service.embeddings import EmbeddingStore
from splitsam.decoder_service.encoder_link import EncoderLink
from splitsam.decoder_service.everything import Everything
from splitsam.decoder_service.model import DecoderModel, PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.predictor import Predictor
from splitsam.decoder_service.prompts import Prompt
from splitsam.decoder_service.refinements import RefinementStore
from splitsam.decoder_service.servicer import DecoderServicer, Parts
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.decoder_service.sources import Sources
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc


class DecoderService:
    """One decoder process: `open` loads, `close` drains."""

    full_name = decoder_pb2.DESCRIPTOR.services_by_name["DecoderService"].full_name
    large_requests = frozenset({"PredictMasks", "PredictMasksStream", "GenerateMasks"})

    def __init__(self, settings: DecoderSettings, metrics: Metrics):
        self._settings = settings
        self._metrics = metrics
        self._keys = settings.key_ring()
        self._device = choose_device(settings.device)
        self._guard = DeviceGuard(self._device, metrics)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.set_num_threads(1)  # what the host computes is small, and other threads only spin for it
        self._batch_prompts = settings.max_batch_prompts if on_gpu else settings.cpu_batch_prompts
        self._forward_prompts = min(settings.prompts_per_forward, self._batch_prompts)
        self._servicer = DecoderServicer(settings)
        self._batcher: Batcher[ImageJob, list[PromptLogits]] | None = None
        self._predictor: Predictor | None = None
        self._everything: Everything | None = None
        self._refinements: RefinementStore | None = None
        self._cache = RecordCache(
            settings.redis_address(),
            timeout_ms=settings.redis_timeout_ms,
            connections=settings.redis_connections,
            metrics=metrics,
        )
        self._watching: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        decoder_pb2_grpc.add_DecoderServiceServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]

    def check_room(self, method: str, tenant: str) -> None:
        if self._batcher is not None and method == "PredictMasks":
            self._batcher.check_room(lane=Lane.CLICK, tenant=tenant)  # without room for a click there is none at all

    async def open(self) -> None:
        settings = self._settings
        model, info = await asyncio.to_thread(self._load)
        self._metrics.model.labels(info.name, info.model_id, info.precision, info.device).set(1)
        on_gpu = self._device.type == "cuda"
        self._batcher = Batcher(
            self._guard.guarded_on_loop(model.decode_on_loop) if on_gpu else self._guard.guarded(model.decode),
            name="decoder",
            max_weight=self._batch_prompts,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            max_queue_ms=settings.lane_queue_ms,
            metrics=self._metrics,
            weigh=lambda job: len(job.prompts),
            niceness=0 if on_gpu else CLICK_NICENESS,
        )
        self._batcher.start()
        embeddings = EmbeddingStore(
            self._cache,
            self._keys,
            model_id=info.model_id,
            prepare=model.prepare,
            guard=self._guard,
            budget_bytes=settings.memory_bytes,
            ttl_s=settings.embedding_ttl_s,
            metrics=self._metrics,
        )
        self._refinements = refinements = RefinementStore(
            self._cache,
            self._keys,
            budget_bytes=settings.logits_memory_bytes,
            ttl_s=settings.refinement_ttl_s,
            metrics=self._metrics,
        )
        self._predictor = Predictor(
            self._batcher,
            embeddings,
            refinements,
            self._guard,
            batch_prompts=self._batch_prompts,
            format_threads=settings.format_threads,
            max_reply_bytes=settings.max_reply_bytes,
            metrics=self._metrics,
        )
        self._everything = Everything(
            self._batcher,
            refinements,
            self._guard,
            piece_points=self._forward_prompts,
            threads=settings.format_threads,
            max_reply_bytes=settings.max_reply_bytes,
        )
        sources = Sources(embeddings, EncoderLink(settings), max_image_bytes=settings.max_upload_bytes // 2)
        self._servicer.load(Parts(self._predictor, self._everything, embeddings, sources, info))
        self._watching = asyncio.create_task(watch_redis(self._cache, self._metrics))

    async def lost(self) -> str:
        return await self._guard.lost()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._batcher is not None:
            await self._batcher.close()
        if self._predictor is not None:
            await self._predictor.close()
        if self._everything is not None:
            await self._everything.close()
        if self._refinements is not None:
            await self._refinements.close()
        await self._cache.close()

    def _load(self) -> tuple[DecoderModel, ModelInfo]:
        settings = self._settings
        loaded = load_model(
            model=settings.model,
            checkpoint=settings.checkpoint,
            sha256=settings.sha256,
            cache_dir=settings.cache_dir,
        )
        model = DecoderModel(loaded.sam, self._device, settings.precision, self._forward_prompts, settings.kernels)
        model.capture()
        model.decode([_warm_up_job()])
        info = ModelInfo(
            name=loaded.name,
            model_id=loaded.model_id,
            demonstration=loaded.demonstration,
            precision=settings.precision,
            device=describe_device(self._device),
            notes=(*loaded.notes, *kernel_notes(settings, self._device)),
        )
        return model, info


def kernel_notes(settings: DecoderSettings, device: torch.device) -> tuple[str, ...]:
    """What a GPU could do and does not."""
    if device.type != "cuda":
        return ()
    if not settings.kernels:
        return ("kernels: switched off",)
    if settings.precision == "fp32":
        return ("kernels: in fp32 they cut masks alone; decoding with them needs --precision bf16",)
    return ()


def _warm_up_job() -> ImageJob:
    """One click in the middle of an empty embedding, and one that refines a mask."""
    point, label = np.full((1, 2), IMAGE_SIDE_PX / 2, np.float32), np.ones(1, np.int64)
    mask_input = np.zeros((LOW_RES_SIDE_PX, LOW_RES_SIDE_PX), np.float32)
    prompts = (Prompt(point, label), Prompt(point, label, mask_input=mask_input))
    side = (IMAGE_SIDE_PX, IMAGE_SIDE_PX)
    return ImageJob(torch.zeros(EMBEDDING_SHAPE), side, side, prompts, cut=Cut())
