//! Images of instances: their volumes are snapshotted at one instant, at rest unless the caller wants otherwise. The image is
//! pending until the snapshots are complete; each step is found from the records, by the call or later by the reconciler.
//! Source: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateImage.html>

use hearth_proto::record::v1 as rec;
use hearth_proto::v1;
use hearth_store::Txn;
use hearth_types::volume::GIB;
use hearth_types::{InstanceState, SnapshotState};

use super::idempotency::ClientToken;
use super::register::{available, is_provisioned, new_image};
use super::{Api, image, instance, snapshot, volume};
use crate::api_error::{ApiError, ApiResult};
use crate::check;
use crate::clock;
use crate::core::encode;
use crate::keys;
use crate::life;
use crate::mappings;
use crate::storage;
use crate::tables::{SCHEMA_VERSION, Tables, Versioned};
use crate::volumes;

/// Whether an image goes on by itself, also after a restart: it is made of an instance or of another image.
pub(crate) fn is_made_of_others(spec: &rec::ImageSpec) -> bool {
    !spec.source_instance.is_empty() || !spec.source_image.is_empty()
}

/// Whether a set of snapshots can no longer become complete.
fn ended(tables: &Tables, ids: &[String]) -> bool {
    ids.iter().any(|id| {
        tables
            .snapshot(id)
            .is_none_or(|(spec, status)| spec.deleted || snapshot::state_of(status.as_deref()) == SnapshotState::Error)
    })
}

impl Api {
    pub(crate) async fn do_create_image(
        &self,
        account: String,
        mut request: v1::CreateImageRequest,
    ) -> ApiResult<v1::Image> {
        let token_text = std::mem::take(&mut request.client_token);
        check::client_token(&token_text)?;
        let token = ClientToken::new(&account, "CreateImage", &token_text, &request);
        mappings::check(&request.block_device_mappings)?;
        check::tags_of("snapshot_tags", &request.snapshot_tags)?;
        let mut spec = new_image(&account, &request.name, &request.description, &request.tags, &token_text)?;
        spec.snapshot_tags.clone_from(&request.snapshot_tags);
        let made = self
            .register(&account, token.as_ref(), |tables| {
                let (source, status) = instance::find(tables, &account, &request.instance_id)?;
                let state = life::state_of(&source, status.as_deref());
                if !matches!(state, InstanceState::Running | InstanceState::Stopped) {
                    let message = format!(
                        "instance {} is {state}; images are made of running and stopped ones",
                        source.instance_id
                    );
                    return Err(ApiError::wrong_state("IncorrectInstanceState", message));
                }
                let agent_spec = source.spec.clone().unwrap_or_default();
                if agent_spec.bundle_root.is_some() {
                    let message = "its root device is instance store; bundle it instead";
                    return Err(ApiError::invalid("instance_id", message));
                }
                let mut own: Vec<v1::BlockDeviceMapping> =
                    agent_spec.volumes.iter().map(|slot| mapping_of(tables, slot)).collect();
                own.extend(agent_spec.instance_store.iter().map(|disk| v1::BlockDeviceMapping {
                    device_name: disk.device_name.clone(),
                    virtual_name: disk.virtual_name.clone(),
                    ..Default::default()
                }));
                let restart = state == InstanceState::Running && !request.no_reboot;
                let merged = mappings::merge(&own, &request.block_device_mappings);
                let mut txn = check_own(tables, &account, &agent_spec, &merged)?;
                if restart {
                    let (reason, _) = life::by_user(clock::now_ms());
                    let text = format!("Stopped for image {}", spec.image_id);
                    let stopped = life::want(&source, v1::RunState::Stopped, false, reason, text);
                    let key = keys::instance_spec(&account, &source.instance_id);
                    txn = txn.compare_mod_revision(&key, source.revision).put(&key, encode(&stopped));
                }
                let boot = agent_spec.boot.as_ref().map(|boot| v1::BootOverride {
                    extra_cmdline: boot.extra_cmdline.clone(),
                    cmdline: boot.cmdline.clone(),
                });
                let spec = rec::ImageSpec {
                    root_device_name: agent_spec.root_device_name.clone(),
                    boot,
                    block_device_mappings: merged,
                    source_instance: source.instance_id.clone(),
                    restart_source: restart,
                    ..spec.clone()
                };
                let status = rec::ImageStatus {
                    schema_version: SCHEMA_VERSION,
                    state: v1::ImageState::Pending.into(),
                    ..Default::default()
                };
                Ok((spec, status, txn))
            })
            .await?;
        // With a running guest the point in time is now; what waits for a shutdown goes on by itself.
        if let Err(error) = self.advance_image(&made.image_id).await {
            tracing::warn!(image = made.image_id, %error, "the image's snapshots will be tried again");
        }
        let tables = self.core.tables();
        let (spec, status) = image::find(&tables, &account, &made.image_id)?;
        Ok(image::view(spec, status))
    }

    /// Takes the next step of an image that is made of an instance or of another image.
    pub(crate) async fn advance_image(&self, id: &str) -> ApiResult<()> {
        let Some((spec, pending)) = self.pending_image(id) else { return Ok(()) };
        if !spec.source_image.is_empty() {
            return self.advance_copy(&spec).await;
        }
        if !pending {
            return self.restart_source(&spec).await;
        }
        if spec.pending_snapshots.is_empty() {
            let source = self.core.tables().instance(&spec.source_instance);
            let Some((source, status)) = source else {
                return self.end_image(&spec, Err("the instance is gone".to_owned())).await;
            };
            let state = life::state_of(&source, status.as_deref());
            let ready = match (spec.restart_source, state) {
                (true, InstanceState::Stopped) | (false, InstanceState::Running | InstanceState::Stopped) => true,
                (_, InstanceState::Stopping) | (false, InstanceState::Pending) => false,
                _ => return self.end_image(&spec, Err(format!("instance {} is {state}", source.instance_id))).await,
            };
            if !ready {
                return Ok(());
            }
            return match self.snapshot_for_image(&spec, &source).await {
                Ok(snapshots) => self.note_snapshots(&spec, &source, snapshots).await,
                Err(error) => {
                    // Without a set of snapshots the next try makes one; a set that failed stays failed.
                    let set = self.set_token(&spec).and_then(|token| token.replay(&self.core.tables()).ok()?);
                    if set.is_some_and(|ids| ended(&self.core.tables(), &ids)) {
                        self.end_image(&spec, Err(error.to_string())).await?;
                    }
                    Err(error)
                }
            };
        }
        if spec.restart_source {
            return self.restart_source(&spec).await;
        }
        let states: Vec<(SnapshotState, u64)> = {
            let tables = self.core.tables();
            let found = spec.pending_snapshots.iter().map(|id| tables.snapshot(id));
            found
                .map(|found| {
                    found.filter(|(spec, _)| !spec.deleted).map_or((SnapshotState::Error, 0), |(spec, status)| {
                        (snapshot::state_of(status.as_deref()), spec.volume_bytes)
                    })
                })
                .collect()
        };
        if states.iter().any(|(state, _)| *state == SnapshotState::Error) {
            return self.end_image(&spec, Err("a snapshot of its volumes failed".to_owned())).await;
        }
        if states.iter().all(|(state, _)| *state == SnapshotState::Completed) {
            return self.end_image(&spec, Ok(states.first().map_or(0, |(_, bytes)| *bytes))).await;
        }
        Ok(())
    }

    /// Starts the instance again that was shut down for an image.
    async fn restart_source(&self, spec: &rec::ImageSpec) -> ApiResult<()> {
        let ids = [spec.source_instance.clone()];
        if let Err(error) = self.do_start(&spec.account_id, &ids).await {
            tracing::warn!(image = spec.image_id, instance = spec.source_instance, %error, "the instance is not started again");
        }
        self.change_image(spec, |image| image.restart_source = false).await
    }

    /// Under this token the snapshots of an image are made.
    fn set_token(&self, spec: &rec::ImageSpec) -> Option<ClientToken> {
        let params = v1::GetImageRequest { image_id: spec.image_id.clone() };
        ClientToken::new(&spec.account_id, "SnapshotsOfImage", &spec.image_id, &params)
    }

    pub(crate) fn pending_image(&self, id: &str) -> Option<(Versioned<rec::ImageSpec>, bool)> {
        let tables = self.core.tables();
        let entry = tables.images.get(id)?;
        let spec = entry.spec.clone().filter(|spec| is_made_of_others(spec) && !spec.deregistered)?;
        let pending = entry.status.as_ref().is_some_and(|status| status.state() == v1::ImageState::Pending);
        (pending || spec.restart_source).then_some((spec, pending))
    }

    /// One set of snapshots per image, however often it is tried.
    async fn snapshot_for_image(
        &self,
        spec: &rec::ImageSpec,
        source: &rec::InstanceSpec,
    ) -> ApiResult<Vec<v1::Snapshot>> {
        let wanted: Vec<String> = {
            let kept = |slot: &&v1::AttachedVolume| {
                spec.block_device_mappings.iter().any(|mapping| {
                    mapping.device_name == slot.device_name
                        && mapping.ebs.as_ref().is_some_and(|ebs| ebs.snapshot_id.is_empty())
                })
            };
            let slots = source.spec.iter().flat_map(|spec| &spec.volumes);
            slots.into_iter().filter(kept).map(|slot| volumes::id_of(slot).to_owned()).collect()
        };
        let description = format!("Created by CreateImage({}) for {}", spec.source_instance, spec.image_id);
        let order = snapshot::order(&spec.account_id, description, spec.snapshot_tags.clone(), String::new())?;
        self.make_snapshots(order, self.set_token(spec), |tables| {
            wanted.iter().map(|id| volume::find(tables, &spec.account_id, id).cloned()).collect()
        })
        .await
    }

    /// Writes the snapshots into the image's mappings.
    async fn note_snapshots(
        &self,
        spec: &rec::ImageSpec,
        source: &rec::InstanceSpec,
        snapshots: Vec<v1::Snapshot>,
    ) -> ApiResult<()> {
        let slots: Vec<(String, String)> = source
            .spec
            .iter()
            .flat_map(|spec| &spec.volumes)
            .map(|slot| (slot.device_name.clone(), volumes::id_of(slot).to_owned()))
            .collect();
        let mut ids = Vec::new();
        let mut mappings = spec.block_device_mappings.clone();
        let root = spec.root_device_name.clone();
        for mapping in &mut mappings {
            let volume = slots.iter().find(|(device, _)| *device == mapping.device_name).map(|(_, id)| id);
            let made = snapshots.iter().find(|snapshot| Some(&snapshot.volume_id) == volume);
            let Some((made, ebs)) = made.zip(mapping.ebs.as_mut().filter(|ebs| ebs.snapshot_id.is_empty())) else {
                continue;
            };
            ebs.snapshot_id.clone_from(&made.snapshot_id);
            // The volume may have grown since the image was asked for.
            ebs.volume_size_bytes = ebs.volume_size_bytes.max(made.volume_size_bytes.next_multiple_of(GIB));
            // The root's is first: it tells the image's size.
            let place = if mapping.device_name == root { 0 } else { ids.len() };
            ids.insert(place, made.snapshot_id.clone());
        }
        if !ids.first().is_some_and(|first| mappings.iter().any(|mapping| is_root_with(mapping, &root, first))) {
            return self.end_image(spec, Err("its root volume was detached".to_owned())).await;
        }
        let key = keys::image_spec(&spec.account_id, &spec.image_id);
        let noted = self
            .core
            .update(|tables| {
                let known = tables.images.get(&spec.image_id).and_then(|entry| entry.spec.as_ref());
                let Some(known) = known else { return Ok((None, true)) };
                let mut new = (*known.value).clone();
                new.block_device_mappings.clone_from(&mappings);
                new.pending_snapshots.clone_from(&ids);
                let mut txn = Txn::new().compare_mod_revision(&key, known.revision).put(&key, encode(&new));
                for id in &ids {
                    let Some((made, _)) = tables.snapshot(id).filter(|(made, _)| !made.deleted) else {
                        return Ok((None, false));
                    };
                    // Whoever deletes it at the same time has to look again.
                    let key = keys::snapshot_spec(&made.account_id, id);
                    txn = txn.compare_mod_revision(&key, made.revision).put(&key, encode(&*made.value));
                }
                Ok((Some(txn), true))
            })
            .await?;
        match noted {
            true => Ok(()),
            false => self.end_image(spec, Err("a snapshot of its volumes was deleted".to_owned())).await,
        }
    }

    async fn change_image(&self, spec: &rec::ImageSpec, change: impl Fn(&mut rec::ImageSpec)) -> ApiResult<()> {
        let key = keys::image_spec(&spec.account_id, &spec.image_id);
        self.core
            .update(|tables| {
                let known = tables.images.get(&spec.image_id).and_then(|entry| entry.spec.as_ref());
                let Some(known) = known else { return Ok((None, ())) };
                let mut new = (*known.value).clone();
                change(&mut new);
                Ok((Some(Txn::new().compare_mod_revision(&key, known.revision).put(&key, encode(&new))), ()))
            })
            .await
    }

    /// Writes how the making of an image ended.
    async fn end_image(&self, spec: &rec::ImageSpec, outcome: Result<u64, String>) -> ApiResult<()> {
        let status = match &outcome {
            Ok(size_bytes) => available(*size_bytes),
            Err(why) => rec::ImageStatus {
                schema_version: SCHEMA_VERSION,
                state: v1::ImageState::Failed.into(),
                reason: Some(v1::StateReason { code: "Server.InternalError".to_owned(), message: why.clone() }),
                ..Default::default()
            },
        };
        let (account, id) = (&spec.account_id, &spec.image_id);
        let key = keys::image_status(account, id);
        // Two may look at the same image; it ends once.
        let is_first = self
            .core
            .update(|tables| {
                let known = tables.images.get(id).and_then(|entry| entry.status.as_ref());
                let Some(known) = known.filter(|known| known.state() == v1::ImageState::Pending) else {
                    return Ok((None, false));
                };
                let txn = Txn::new()
                    .compare_exists(keys::image_spec(account, id))
                    .compare_mod_revision(&key, known.revision)
                    .put(&key, encode(&status));
                let name = keys::image_name(account, &spec.name);
                Ok((Some(if outcome.is_err() { txn.delete(name) } else { txn }), true))
            })
            .await?;
        if !is_first {
            return Ok(());
        }
        match outcome {
            Ok(bytes) => tracing::info!(image = id, name = spec.name, bytes, "image available"),
            Err(why) => tracing::warn!(image = id, name = spec.name, why, "the image failed"),
        }
        Ok(())
    }
}

fn is_root_with(mapping: &v1::BlockDeviceMapping, root: &str, snapshot: &str) -> bool {
    mapping.device_name == root && mapping.ebs.as_ref().is_some_and(|ebs| ebs.snapshot_id == snapshot)
}

/// Mappings of an image that is to be made of an instance: the root and other attached volumes are snapshotted and keep at least
/// their size, what is added must be something a launch can make. Answers a transaction that holds the snapshots named in them.
fn check_own(
    tables: &Tables,
    account: &str,
    agent_spec: &v1::InstanceSpec,
    merged: &[v1::BlockDeviceMapping],
) -> ApiResult<Txn> {
    let refuse = |mapping: &v1::BlockDeviceMapping, message: &str| {
        Err(mappings::refused(format!("{}: {message}", mapping.device_name)))
    };
    let mut txn = Txn::new();
    let root = merged.iter().find(|mapping| mapping.device_name == agent_spec.root_device_name);
    if root.is_none_or(|root| root.ebs.is_none()) {
        return Err(mappings::refused("the root volume cannot be left out"));
    }
    for (mapping, ebs) in merged.iter().filter_map(|mapping| Some((mapping, mapping.ebs.as_ref()?))) {
        let slot = agent_spec.volumes.iter().find(|slot| slot.device_name == mapping.device_name);
        let attached = slot.and_then(|slot| slot.volume.as_ref());
        if attached.is_some_and(|volume| !volume.backend.is_empty()) {
            return refuse(mapping, "its volume is kept by a volume backend and cannot be snapshotted; leave it out");
        }
        let least = match (attached, ebs.snapshot_id.as_str()) {
            (Some(_), id) if !id.is_empty() => return refuse(mapping, "a snapshot of the attached volume is made"),
            (Some(volume), _) if ebs.encrypted.is_some_and(|wanted| wanted != volume.encrypted) => {
                return refuse(mapping, "the snapshot is encrypted if the volume is; copy the image to encrypt it");
            }
            (Some(volume), _) => volume.size_bytes,
            (None, "") => 0,
            (None, id) => {
                let source = snapshot::find_completed(tables, account, id)?;
                txn = source.pin(txn);
                if ebs.encrypted == Some(false) && storage::is_encrypted(&source.base()) {
                    return refuse(mapping, "a volume made from an encrypted snapshot is encrypted");
                }
                source.base().size_bytes
            }
        };
        volume::Shape::new(&ebs.volume_type, ebs.volume_size_bytes, least, ebs.iops, ebs.throughput_mibps)?;
    }
    Ok(txn)
}

/// An attached volume as a mapping without its snapshot.
fn mapping_of(tables: &Tables, slot: &v1::AttachedVolume) -> v1::BlockDeviceMapping {
    let volume = slot.volume.clone().unwrap_or_default();
    let record = tables.volumes.get(&volume.volume_id);
    let kind = record.map(|record| record.volume_type.clone()).unwrap_or_default();
    let provisioned = is_provisioned(&kind);
    v1::BlockDeviceMapping {
        device_name: slot.device_name.clone(),
        ebs: Some(v1::EbsBlockDevice {
            snapshot_id: String::new(),
            volume_size_bytes: volume.size_bytes.next_multiple_of(GIB),
            iops: provisioned.then_some(volume.iops),
            throughput_mibps: (kind == "gp3").then_some(volume.throughput_mibps),
            volume_type: kind,
            delete_on_termination: record.map(|record| record.delete_on_termination),
            encrypted: Some(volume.encrypted),
        }),
        ..Default::default()
    }
}
