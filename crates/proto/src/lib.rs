//! gRPC and wire messages generated from `proto/`.

/// Version 1 of hearth's API: <https://protobuf.dev/programming-guides/proto3/> messages and gRPC services, documented in
/// `proto/hearth/v1/*.proto`.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("hearth.v1");
}

/// What the control plane keeps in its store.
pub mod record {
    /// Version 1 of the records, documented in `proto/hearth/record/v1/record.proto`.
    #[allow(missing_docs, clippy::all, rustdoc::all)]
    pub mod v1 {
        tonic::include_proto!("hearth.record.v1");
    }
}

/// Encoded `FileDescriptorSet` of [`v1`], for the gRPC reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hearth.v1.descriptors"));
