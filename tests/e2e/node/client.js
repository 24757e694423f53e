// Streams one generation and prints what it got as one JSON object.
// usage: node client.js PROTO_FOLDER TARGET REQUEST_JSON
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

// The parts of google/rpc/status.proto and error_details.proto that are read here.
const GOOGLE_RPC = `
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message RequestInfo { string request_id = 1; string serving_data = 2; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
  message ResourceInfo { string resource_type = 1; string resource_name = 2; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`;

function decodeDetails(metadata) {
  const root = protobuf.parse(GOOGLE_RPC, { keepCase: true }).root;
  const [packed] = metadata.get("grpc-status-details-bin");
  if (packed === undefined) return null;
  const status = root.lookupType("google.rpc.Status").decode(packed);
  const details = {};
  for (const detail of status.details) {
    const name = detail.type_url.split("/").pop();
    const type = root.lookupType(name);
    const options = { longs: Number, objects: true };
    details[name] = type.toObject(type.decode(detail.value), options);
  }
  return { code: status.code, message: status.message, details };
}

function main() {
  const [protoFolder, target, requestJson] = process.argv.slice(2);
  const definition = loader.loadSync("photon/v1/inference.proto", {
    includeDirs: [protoFolder],
    keepCase: true,
    longs: Number,
    enums: String,
    oneofs: true,
  });
  const { photon } = grpc.loadPackageDefinition(definition);
  const client = new photon.v1.InferenceService(target, grpc.credentials.createInsecure());
  const result = { events: [], text: "", seqs: [], summary: null, error: null, trailers: {} };
  const deadline = new Date(Date.now() + 20000);
  const call = client.StreamGenerate(JSON.parse(requestJson), { deadline });
  call.on("data", (message) => {
    result.events.push(message.event);
    result.seqs.push(message.seq);
    if (message.event === "delta") result.text += message.delta.text;
    if (message.event === "finished") result.finish = message.finished.finish;
    if (message.event === "summary") result.summary = message.summary;
  });
  call.on("error", (error) => {
    result.error = {
      code: error.code,
      message: error.details,
      status: decodeDetails(error.metadata),
      pushback: error.metadata.get("grpc-retry-pushback-ms"),
    };
  });
  call.on("status", (status) => {
    for (const [key, value] of Object.entries(status.metadata.getMap())) {
      if (typeof value === "string") result.trailers[key] = value;
    }
    result.code = status.code;
    client.close();
    process.stdout.write(JSON.stringify(result) + "\n");
  });
}

main();
