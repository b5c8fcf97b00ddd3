//! What agents may do with the object store through the control plane.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use hearth_proto::v1;
use hearth_snapshot::{
    CHUNK_BYTES, ChunkStore, Epoch, KeyDomain, KeyDomainId, ManifestSpec, ManifestWriter, ObjectStore, SnapshotKey,
};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use tonic::Code;
use tonic::transport::Channel;
use v1::object_service_client::ObjectServiceClient;

use crate::agent::{FakeAgent, Snapshots};
use crate::cloud::{Cloud, request};
use crate::disks::GIB;

async fn put(client: &mut ObjectServiceClient<Channel>, key: &str, data: &[u8], create_only: bool) -> Code {
    let request = v1::PutObjectRequest { key: key.into(), data: data.to_vec().into(), create_only };
    client.put_object(request).await.err().map_or(Code::Ok, |status| status.code())
}

/// Name and content of every object that publishing this manifest writes.
async fn objects_of(id: &str, domain: &v1::KeyDomain, epoch: u32, byte: u8) -> Vec<(String, Bytes)> {
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let secret: [u8; 32] = domain.secret[..].try_into().unwrap();
    let store = ChunkStore::new(memory.clone(), KeyDomain::new(KeyDomainId::new(&domain.name).unwrap(), &secret));
    let spec = ManifestSpec { id: SnapshotKey::new(id).unwrap(), size_bytes: GIB, epoch: Epoch(epoch) };
    let mut writer = ManifestWriter::new(spec, None).unwrap();
    let content = Bytes::from(vec![byte; CHUNK_BYTES]);
    writer.set(0, store.put_chunk(Epoch(epoch), content).await.unwrap()).unwrap();
    writer.commit(&store).await.unwrap();
    let mut found = Vec::new();
    for meta in memory.list(None).try_collect::<Vec<_>>().await.unwrap() {
        let data = memory.get(&meta.location).await.unwrap().bytes().await.unwrap();
        found.push((meta.location.to_string(), data));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_writes_its_own_work_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(dir.path()).await;
    let (agent, _session) = FakeAgent::connected(&cloud, "host-a").await;
    let (stranger, _other_session) = FakeAgent::connected(&cloud, "host-b").await;
    let mut user = cloud.user().await;
    let image = user.import("debian").await;
    let placement = Some(v1::Placement { host_id: agent.host_id.clone(), ..Default::default() });
    let (_, root) = user.run_one(v1::RunInstancesRequest { placement, ..request(&image, "t3.nano") }).await;
    agent.memory.lock().manners.snapshots = Snapshots::Freeze;
    let snapshot = user.snapshot(&root).await.unwrap().snapshot_id;
    let told = agent.memory.lock().sets.values().next().cloned().unwrap().snapshots.remove(0);
    let domain = told.key_domain.unwrap();
    let mut mine = agent.object_client(&cloud).await;
    let mut others = stranger.object_client(&cloud).await;

    for (key, data) in objects_of(&snapshot, &domain, told.epoch, 5).await {
        let mut damaged = data.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        if key.starts_with("snap/") {
            assert_eq!(put(&mut others, &key, &data, true).await, Code::PermissionDenied, "{key}: not asked to");
        } else {
            assert_eq!(put(&mut others, &key, &damaged, false).await, Code::InvalidArgument, "{key}");
            // The stump of a write that broke off is no reason to do without.
            cloud.objects.put(&key.as_str().into(), damaged.clone().into()).await.unwrap();
            assert_eq!(put(&mut mine, &key, &data, true).await, Code::AlreadyExists);
        }
        assert_eq!(put(&mut mine, &key, &data, false).await, Code::Ok, "{key}");
        assert_eq!(put(&mut mine, &key, &data, false).await, Code::Ok, "{key} again");
        let refused = put(&mut mine, &key, &damaged, false).await;
        let expected = if key.starts_with("snap/") { Code::AlreadyExists } else { Code::InvalidArgument };
        assert_eq!(refused, expected, "{key}: other content");
        let there = others
            .get_object(v1::GetObjectRequest { key: key.clone(), head: false, ..Default::default() })
            .await
            .unwrap();
        assert_eq!(there.into_inner().data, data, "{key}");
        let part = v1::GetObjectRequest { key: key.clone(), offset: 2, length: 3, ..Default::default() };
        let part = others.get_object(part).await.unwrap().into_inner();
        assert_eq!((&part.data[..], part.size_bytes), (&data[2..5], data.len() as u64), "{key}");
    }
    let imported = image.block_device_mappings[0].ebs.clone().unwrap().snapshot_id;
    assert_eq!(put(&mut mine, &format!("snap/{imported}/root"), b"x", false).await, Code::PermissionDenied);
    assert_eq!(put(&mut mine, &format!("snap/{imported}/prefetch"), b"x", false).await, Code::Ok);
    assert_eq!(put(&mut others, &format!("snap/{imported}/prefetch"), b"y", false).await, Code::PermissionDenied);
    for key in ["hello", "snap/x", "chunk/plain/1/ab/cd", "bundle/1/a.manifest.json", "chunk/../x"] {
        let code = put(&mut mine, key, b"x", false).await;
        assert!(matches!(code, Code::PermissionDenied | Code::InvalidArgument), "{key}: {code}");
        let read = mine
            .get_object(v1::GetObjectRequest { key: key.into(), head: true, ..Default::default() })
            .await
            .unwrap_err()
            .code();
        assert!(matches!(read, Code::PermissionDenied | Code::InvalidArgument), "{key}: {read}");
    }
    let list = |prefix: &str| v1::ListObjectsRequest { prefix: prefix.into(), after: String::new() };
    assert_eq!(mine.list_objects(list("snap")).await.unwrap().into_inner().objects.len(), 3);
    for prefix in ["", "bundle"] {
        assert_eq!(mine.list_objects(list(prefix)).await.unwrap_err().code(), Code::PermissionDenied, "'{prefix}'");
    }
}
