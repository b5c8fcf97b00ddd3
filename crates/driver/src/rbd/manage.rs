//! What is done with images by the cluster's own programs.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Name;
use crate::DriverError;
use crate::command::run;

/// How long a client stays on the blocklist. Whoever was fenced learns of it when it speaks to the cluster again; a host that sleeps
/// for longer than this could write.
const BLOCKLIST_SECONDS: u64 = 7 * 24 * 3600;

/// A pool of a cluster, as this host reaches it.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// `ceph.conf`; absent: Ceph's default.
    pub conf: Option<PathBuf>,
    /// Ceph user without `client.`, whose keyring `conf` tells; absent: Ceph's default, `admin`. It needs the capabilities
    /// `mon 'profile rbd'` and `osd 'profile rbd pool=…'`.
    pub user: Option<Name>,
    /// Pool.
    pub pool: Name,
    /// Namespace in the pool; absent: the default one.
    pub namespace: Option<Name>,
    /// Longest that one call of a program may take.
    pub patience: Duration,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ImageInfo {
    /// Size in bytes.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// Size in bytes of the objects it consists of.
    #[serde(rename = "object_size")]
    pub object_bytes: u64,
    /// Features, by Ceph's names.
    pub features: Vec<String>,
    /// The snapshot that it is a clone of, until it was flattened.
    pub parent: Option<Parent>,
}

/// What a clone is a clone of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Parent {
    /// Image.
    pub image: String,
    /// Snapshot.
    pub snapshot: String,
}

/// A snapshot of an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// Size of the image then, in bytes.
    #[serde(rename = "size")]
    pub size_bytes: u64,
}

/// A range of an image that changed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// It holds data; else it reads as zeros.
    #[serde(deserialize_with = "truth")]
    pub exists: bool,
}

/// A bool, or what `rbd diff` prints for one.
fn truth<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Truth {
        Bool(bool),
        Text(String),
    }
    match Truth::deserialize(deserializer)? {
        Truth::Bool(value) => Ok(value),
        Truth::Text(text) if text == "true" => Ok(true),
        Truth::Text(text) if text == "false" => Ok(false),
        Truth::Text(text) => Err(serde::de::Error::custom(format!("{text:?} is neither true nor false"))),
    }
}

#[derive(Deserialize)]
struct Status {
    watchers: Vec<Watcher>,
}

#[derive(Deserialize)]
struct Watcher {
    address: String,
}

#[derive(Deserialize)]
struct Lock {
    id: String,
    locker: String,
    address: String,
}

/// Attribute of the claim's object.
const GENERATION: &str = "generation";

/// The object that keeps the generation of an image's newest attachment. Not in the image's own metadata: to change that one needs the
/// lock of whoever has it.
fn claim_object(image: &Name) -> String {
    format!("hearth.{image}")
}

impl Cluster {
    /// Options that each of Ceph's programs needs.
    fn common(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(conf) = &self.conf {
            words.extend(["--conf".to_owned(), conf.display().to_string()]);
        }
        if let Some(user) = &self.user {
            words.extend(["--id".to_owned(), user.to_string()]);
        }
        words
    }

    fn image(&self, image: &Name) -> String {
        match &self.namespace {
            Some(namespace) => format!("{}/{namespace}/{image}", self.pool),
            None => format!("{}/{image}", self.pool),
        }
    }

    fn at(&self, image: &Name, snapshot: &Name) -> String {
        format!("{}@{snapshot}", self.image(image))
    }

    fn call(&self, program: &str, words: &[&str]) -> Result<Vec<u8>, DriverError> {
        let mut arguments = self.common();
        arguments.extend(words.iter().map(|word| (*word).to_owned()));
        run(program, &arguments, self.patience)
    }

    fn rbd(&self, words: &[&str]) -> Result<(), DriverError> {
        self.call("rbd", words).map(drop)
    }

    fn ask<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T, DriverError> {
        let words = [words, &["--format", "json"]].concat();
        let output = self.call("rbd", &words)?;
        serde_json::from_slice(&output).map_err(|error| DriverError::Output {
            command: format!("rbd {}", words.join(" ")),
            why: error.to_string(),
        })
    }

    /// Makes a blank image.
    ///
    /// # Errors
    /// [`DriverError::Exists`]: there is one of this name.
    pub fn create(&self, image: &Name, bytes: u64) -> Result<(), DriverError> {
        self.rbd(&["create", "--no-progress", "--size", &format!("{bytes}B"), &self.image(image)])
    }

    /// Looks at an image.
    pub fn info(&self, image: &Name) -> Result<ImageInfo, DriverError> {
        self.ask(&["info", &self.image(image)])
    }

    /// Names of all images.
    pub fn list(&self) -> Result<Vec<String>, DriverError> {
        let place = match &self.namespace {
            Some(namespace) => format!("{}/{namespace}", self.pool),
            None => self.pool.to_string(),
        };
        self.ask(&["ls", &place])
    }

    /// Makes an image larger. A storage daemon that serves it goes on with the old size until it is started anew.
    ///
    /// # Errors
    /// [`DriverError::Shrink`].
    pub fn grow(&self, image: &Name, bytes: u64) -> Result<(), DriverError> {
        let from = self.info(image)?.size_bytes;
        if bytes < from {
            return Err(DriverError::Shrink { image: self.image(image), from, to: bytes });
        }
        // Without --allow-shrink a race with another growth does no harm.
        self.rbd(&["resize", "--no-progress", "--size", &format!("{bytes}B"), &self.image(image)])
    }

    /// Deletes an image.
    ///
    /// # Errors
    /// [`DriverError::InUse`]: it has snapshots, or a client has it open.
    pub fn remove(&self, image: &Name) -> Result<(), DriverError> {
        self.rbd(&["rm", "--no-progress", &self.image(image)])?;
        match self.rados(&["rm", &claim_object(image)]) {
            // It was never attached.
            Ok(_) | Err(DriverError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes a snapshot: what was flushed before is in it. The client that has the image open, if any, takes part.
    ///
    /// # Errors
    /// [`DriverError::Exists`].
    pub fn snapshot(&self, image: &Name, snapshot: &Name) -> Result<(), DriverError> {
        self.rbd(&["snap", "create", "--no-progress", &self.at(image, snapshot)])
    }

    /// The snapshots of an image, oldest first.
    pub fn snapshots(&self, image: &Name) -> Result<Vec<SnapshotInfo>, DriverError> {
        self.ask(&["snap", "ls", &self.image(image)])
    }

    /// Deletes a snapshot. Its clones, if there are any, keep what they need of it.
    pub fn remove_snapshot(&self, image: &Name, snapshot: &Name) -> Result<(), DriverError> {
        self.rbd(&["snap", "rm", "--no-progress", &self.at(image, snapshot)])
    }

    /// Makes an image that begins as a copy of a snapshot, in a moment: the data stays where it is. (Clone format 2, Ceph 13.)
    ///
    /// # Errors
    /// [`DriverError::Exists`].
    pub fn clone_snapshot(&self, image: &Name, snapshot: &Name, child: &Name) -> Result<(), DriverError> {
        self.rbd(&["clone", "--rbd-default-clone-format", "2", &self.at(image, snapshot), &self.image(child)])
    }

    /// Copies into a clone what it still shares with its parent. Takes as long as copying does; may be repeated.
    pub fn flatten(&self, image: &Name) -> Result<(), DriverError> {
        self.rbd(&["flatten", "--no-progress", &self.image(image)])
    }

    /// Ranges of `snapshot` that differ from the earlier snapshot `since`; without that one, those that were ever written.
    pub fn changed(&self, image: &Name, since: Option<&Name>, snapshot: &Name) -> Result<Vec<Extent>, DriverError> {
        let of = self.at(image, snapshot);
        match since {
            Some(since) => self.ask(&["diff", "--from-snap", since.as_str(), &of]),
            None => self.ask(&["diff", &of]),
        }
    }

    /// Claims the image for an attachment, and shuts out every client that has it open. May be repeated.
    ///
    /// Whoever then opens the image must look with [`check_claim`](Self::check_claim) before the first write. That makes it safe however
    /// two attachments meet: of two that both found their claim in place, the one that claimed later has shut out the other, which
    /// had opened the image before it looked.
    ///
    /// # Errors
    /// [`DriverError::Fenced`]: it is claimed for a later attachment.
    pub(super) fn claim(&self, image: &Name, generation: u64) -> Result<(), DriverError> {
        // No claims of images that are not there.
        self.info(image)?;
        if let Some(theirs) = self.claimed(image)?
            && theirs > generation
        {
            return Err(DriverError::Fenced { image: self.image(image), ours: generation, theirs });
        }
        self.rados(&["setxattr", &claim_object(image), GENERATION, &generation.to_string()])?;
        self.fence(image).map(drop)
    }

    /// Looks whether the image is still claimed for this attachment.
    ///
    /// # Errors
    /// [`DriverError::Fenced`]: it is not.
    pub(super) fn check_claim(&self, image: &Name, generation: u64) -> Result<(), DriverError> {
        match self.claimed(image)? {
            Some(theirs) if theirs == generation => Ok(()),
            other => Err(DriverError::Fenced {
                image: self.image(image),
                ours: generation,
                theirs: other.unwrap_or_default(),
            }),
        }
    }

    /// The newest attachment, if there was one.
    pub fn claimed(&self, image: &Name) -> Result<Option<u64>, DriverError> {
        let output = match self.rados(&["getxattr", &claim_object(image), GENERATION]) {
            Ok(output) => output,
            Err(DriverError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&output);
        text.trim().parse().map(Some).map_err(|_| DriverError::Output {
            command: format!("rados getxattr {} {GENERATION}", claim_object(image)),
            why: format!("{text:?} is not a number"),
        })
    }

    fn rados(&self, words: &[&str]) -> Result<Vec<u8>, DriverError> {
        let mut all = vec!["--pool", self.pool.as_str()];
        if let Some(namespace) = &self.namespace {
            all.extend(["--namespace", namespace.as_str()]);
        }
        all.extend(words);
        self.call("rados", &all)
    }

    /// Keeps every client that has the image open now from ever changing it again, and takes their lock. Returns the addresses that
    /// were shut out. May be repeated. [`Export::start`](super::Export::start) does it; by itself it is for a host that was given up.
    pub fn fence(&self, image: &Name) -> Result<Vec<String>, DriverError> {
        let name = self.image(image);
        let locks: Vec<Lock> = self.ask(&["lock", "ls", &name])?;
        let status: Status = self.ask(&["status", &name])?;
        let mut clients: Vec<String> = status.watchers.into_iter().map(|watcher| watcher.address).collect();
        clients.extend(locks.iter().map(|lock| lock.address.clone()));
        clients.sort();
        clients.dedup();
        for client in &clients {
            // First: a client whose lock is taken while it is not shut out takes it back.
            self.call("ceph", &["osd", "blocklist", "add", client, &BLOCKLIST_SECONDS.to_string()])?;
        }
        for lock in locks {
            match self.rbd(&["lock", "rm", &name, &lock.id, &lock.locker]) {
                // Gone since.
                Ok(()) | Err(DriverError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(clients)
    }

    /// What a storage daemon needs to open an image, as a QEMU block node.
    pub(super) fn block_node(&self, image: &Name) -> serde_json::Value {
        let mut node = serde_json::json!({
            "driver": "rbd", "node-name": "disk", "pool": self.pool.as_str(), "image": image.as_str(), "discard": "unmap",
        });
        if let Some(fields) = node.as_object_mut() {
            let mut add = |key: &str, value: Option<String>| {
                if let Some(value) = value {
                    fields.insert(key.to_owned(), value.into());
                }
            };
            add("conf", self.conf.as_ref().map(|path| path.display().to_string()));
            add("user", self.user.as_ref().map(Name::to_string));
            add("namespace", self.namespace.as_ref().map(Name::to_string));
        }
        node
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Ceph 16.2.15 prints it.
    #[test]
    fn output_of_the_programs_is_understood() {
        let info = r#"{"name":"x","id":"10272c0774e8","size":67108864,"objects":16,"order":22,"object_size":4194304,
            "snapshot_count":0,"block_name_prefix":"rbd_data.10272c0774e8","format":2,"features":["layering","exclusive-lock"],
            "op_features":[],"flags":[],"parent":{"pool":"volumes","pool_namespace":"","image":"p","snapshot":"s","trash":false,
            "overlap":67108864}}"#;
        let info: ImageInfo = serde_json::from_str(info).unwrap();
        assert_eq!((info.size_bytes, info.object_bytes), (67_108_864, 4_194_304));
        assert_eq!(info.parent, Some(Parent { image: "p".into(), snapshot: "s".into() }));
        let diff = r#"[{"offset":0,"length":4096,"exists":"true"},{"offset":8192,"length":512,"exists":"false"}]"#;
        let diff: Vec<Extent> = serde_json::from_str(diff).unwrap();
        assert_eq!(diff.iter().map(|extent| extent.exists).collect::<Vec<_>>(), [true, false]);
        assert!(serde_json::from_str::<Vec<Extent>>(r#"[{"offset":0,"length":1,"exists":"maybe"}]"#).is_err());
    }

    #[test]
    #[ignore = "needs a Ceph cluster: scripts/test-ceph"]
    fn of_two_attachments_the_later_one_finds_its_claim() {
        let env = |key: &str| std::env::var(key).unwrap_or_else(|_| panic!("{key} is not set: run scripts/test-ceph"));
        let cluster = Cluster {
            conf: Some(env("HEARTH_TEST_CEPH_CONF").into()),
            user: None,
            pool: env("HEARTH_TEST_CEPH_POOL").parse().unwrap(),
            namespace: None,
            patience: Duration::from_secs(120),
        };
        let image: Name = "vol-claimed".parse().unwrap();
        assert!(matches!(cluster.claim(&image, 1), Err(DriverError::NotFound { .. })));
        cluster.create(&image, 1 << 20).unwrap();
        assert_eq!(cluster.claimed(&image).unwrap(), None);
        assert!(cluster.check_claim(&image, 1).is_err());
        for generation in [1, 7, 7] {
            cluster.claim(&image, generation).unwrap();
            cluster.check_claim(&image, generation).unwrap();
        }
        // The earlier one, which had claimed the image and not looked yet.
        let late = cluster.check_claim(&image, 1);
        assert!(matches!(late, Err(DriverError::Fenced { ours: 1, theirs: 7, .. })), "{late:?}");
        assert!(matches!(cluster.claim(&image, 6), Err(DriverError::Fenced { ours: 6, theirs: 7, .. })));
        cluster.remove(&image).unwrap();
        assert_eq!(cluster.claimed(&image).unwrap(), None);
    }

    #[test]
    fn a_block_node_names_what_differs_from_the_default() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let mut cluster = Cluster {
            conf: None,
            user: None,
            pool: name("volumes"),
            namespace: None,
            patience: Duration::from_secs(1),
        };
        let node = cluster.block_node(&name("vol-1"));
        assert!(node.get("conf").is_none() && node.get("user").is_none() && node["image"] == "vol-1");
        cluster.conf = Some("/a,b".into());
        cluster.namespace = Some(name("ns"));
        let node = cluster.block_node(&name("vol-1"));
        assert!(node["conf"] == "/a,b" && node["namespace"] == "ns");
        assert_eq!(cluster.image(&name("vol-1")), "volumes/ns/vol-1");
    }
}
