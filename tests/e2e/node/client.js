// Makes one call of StreamGenerate, or of BatchGenerate, and prints what it got as one JSON object.
// usage: node client.js PROTO_FOLDER TARGET REQUEST_JSON [METHOD]
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

const root = protobuf.parse(GOOGLE_RPC, { keepCase: true }).root;

function decodeTrailer(metadata) {
  const [packed] = metadata.get("grpc-status-details-bin");
  return packed === undefined ? null : decodeStatus(root.lookupType("google.rpc.Status").decode(packed));
}

function decodeStatus(status) {
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
  const [protoFolder, target, requestJson] = process.argv.slice(2, 5);
  const method = process.argv[5] || "StreamGenerate";
  const definition = loader.loadSync("photon/v1/inference.proto", {
    includeDirs: [protoFolder],
    keepCase: true,
    longs: Number,
    enums: String,
    oneofs: true,
  });
  const { photon } = grpc.loadPackageDefinition(definition);
  const client = new photon.v1.InferenceService(target, grpc.credentials.createInsecure());
  const result = { items: [], events: [], text: "", seqs: [], summary: null, error: null, trailers: {} };
  const deadline = new Date(Date.now() + 20000);
  const call = client[method](JSON.parse(requestJson), { deadline });
  call.on("data", (message) => {
    if (method === "BatchGenerate") {
      const { item, result: kind, response, error } = message;
      result.items.push({
        item: item || 0, // the first is the default, which the loader leaves out
        kind,
        text: response ? response.completions[0].text : null,
        // Decoded by the google/rpc/status.proto beside our files.
        error: error ? decodeStatus(error) : null,
      });
      return;
    }
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
      status: decodeTrailer(error.metadata),
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
