//! gRPC and wire messages generated from proto/.
