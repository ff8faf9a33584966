// What a failed call says: a gRPC code, a stable reason, the fields that were refused, and when to come again.
import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

// The parts of google/rpc/status.proto and error_details.proto that are read here.
const { root } = protobuf.parse(`
  syntax = "proto3";
  message Detail { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Detail details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest { repeated Violation field_violations = 1; }
  message Violation { string field = 1; string description = 2; }
`);
const [Status, ErrorInfo, BadRequest] = ["Status", "ErrorInfo", "BadRequest"].map((name) => root.lookupType(name));

export class SplitsamError extends Error {
  /** @param {import("@grpc/grpc-js").ServiceError} error as a call was given it */
  constructor(error) {
    const [binary] = error.metadata?.get("grpc-status-details-bin") ?? [];
    const details = binary ? Status.decode(binary).details : [];
    const find = (type) => details.find((detail) => detail.typeUrl.endsWith(`/google.rpc.${type.name}`))?.value;
    const [info, bad] = [ErrorInfo, BadRequest].map((type) => find(type) && type.decode(find(type)));
    const reason = info?.reason ?? grpc.status[error.code];
    super(`${error.details} [${reason}]`);
    this.code = error.code;
    this.reason = reason;
    this.violations = (bad?.fieldViolations ?? []).map(({ field, description }) => ({ field, description }));
    this.requestId = info?.metadata.request_id;
    // The same wait as in RetryInfo, in a form that needs no decoding; absent when waiting would not help.
    const [pushback] = error.metadata?.get("grpc-retry-pushback-ms") ?? [];
    this.retryDelayMs = /^\d+$/.test(pushback ?? "") ? Number(pushback) : undefined;
  }
}
