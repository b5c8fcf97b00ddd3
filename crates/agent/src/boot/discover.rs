//! The search itself: Boot Loader Specification entries, then grub.cfg, then the newest kernel.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::BootError;
use super::filesystem::{Filesystem, content_name};
use super::grub::{GrubFile, GrubHost, GrubOutcome, SearchBy};
use super::partition::{MAX_PARTITIONS, Partition, TYPE_ROOT_X86_64, TYPE_XBOOTLDR, partitions};
use super::read_at::ReadAt;
use super::{KernelKind, MAX_CMDLINE, MAX_INITRD_BYTES, MAX_KERNEL_BYTES, bls, grub, kernel_kind};

/// Most file systems of one disk that are opened.
const MAX_FILESYSTEMS: usize = 16;
/// Most Boot Loader Specification entries that are read.
const MAX_BLS_ENTRIES: usize = 256;
/// Most initrd files of one entry.
const MAX_INITRDS: usize = 16;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSet {
    /// The kernel file as it stands in the image.
    pub kernel: Vec<u8>,
    /// Where it was found, for the log: path and partition.
    pub kernel_place: String,
    /// The initrd; several are joined as a boot loader does.
    pub initrd: Option<Vec<u8>>,
    /// The command line.
    pub cmdline: String,
}

/// What an AMI says about its command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Override {
    /// Replaces the one that was found, unless empty.
    pub cmdline: String,
    /// Is added at the end.
    pub extra_cmdline: String,
}

/// A kernel that some configuration names.
struct Candidate<'a> {
    filesystem: &'a Filesystem,
    kernel: String,
    initrds: Vec<(&'a Filesystem, String)>,
    cmdline: String,
}

/// Finds what to boot on `disk`.
///
/// # Errors
/// [`BootError`] when there is nothing, or it cannot be read, or it is larger than allowed.
pub fn discover(disk: &Arc<dyn ReadAt>, overrides: &Override) -> Result<BootSet, BootError> {
    let (filesystems, mut notes) = open_filesystems(disk)?;
    let root = root_filesystem(&filesystems);
    let places = boot_folders(&filesystems, root);
    for (filesystem, folder) in &places {
        let context = Context { filesystems: &filesystems, root, boot: filesystem, folder };
        if let Some(candidate) = context.find(&mut notes) {
            return load(&candidate, overrides);
        }
    }
    let names: Vec<String> = places.iter().map(|(fs, folder)| folder_name(fs, folder)).collect();
    let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) };
    Err(BootError::NoKernel { places: names.join(" or "), notes })
}

fn folder_name(filesystem: &Filesystem, folder: &str) -> String {
    let folder = if folder.is_empty() { "/" } else { folder };
    format!("{folder} of {}", filesystem.partition.place())
}

/// The file systems of a disk, and why others, which are ext4 too, cannot be read.
fn open_filesystems(disk: &Arc<dyn ReadAt>) -> Result<(Vec<Filesystem>, Vec<String>), BootError> {
    let mut parts = partitions(disk)?;
    parts.truncate(MAX_PARTITIONS);
    if parts.is_empty() {
        let whole = Partition {
            number: 0,
            start: 0,
            size: disk.size(),
            kind: String::new(),
            part_uuid: None,
            name: String::new(),
        };
        return match Filesystem::open(disk, &whole)? {
            Some(filesystem) => Ok((vec![filesystem], Vec::new())),
            None => Err(BootError::NotPartitioned),
        };
    }
    let mut found = Vec::new();
    let (mut others, mut unreadable) = (Vec::new(), Vec::new());
    for partition in &parts {
        if found.len() >= MAX_FILESYSTEMS {
            break;
        }
        match Filesystem::open(disk, partition) {
            Ok(Some(filesystem)) => found.push(filesystem),
            Ok(None) => others.push(format!("{}: {}", partition.place(), content_name(disk, partition))),
            Err(error) => unreadable.push(error.to_string()),
        }
    }
    if found.is_empty() {
        others.append(&mut unreadable);
        return Err(BootError::NoFilesystem(others.join(", ")));
    }
    Ok((found, unreadable))
}

/// The file system of `/`: by partition type, else what looks most like one, else the first.
fn root_filesystem(filesystems: &[Filesystem]) -> Option<&Filesystem> {
    filesystems.iter().min_by_key(|fs| {
        let has_init = ["/sbin/init", "/init", "/bin/sh"].iter().any(|path| fs.is_file(path));
        let by_type = fs.partition.kind == TYPE_ROOT_X86_64;
        let by_label = matches!(fs.label.as_str(), "root" | "/" | "rootfs" | "cloudimg-rootfs");
        (!has_init, !by_type, !by_label, !fs.is_directory("/etc"), fs.partition.number)
    })
}

/// Where kernels may lie: `/boot` of the root, and partitions that are mounted there.
fn boot_folders<'a>(
    filesystems: &'a [Filesystem],
    root: Option<&'a Filesystem>,
) -> Vec<(&'a Filesystem, &'static str)> {
    let is_root = |fs: &Filesystem| root.is_some_and(|root| root.partition.number == fs.partition.number);
    let mut folders: Vec<(&Filesystem, &'static str)> = Vec::new();
    folders
        .extend(filesystems.iter().filter(|fs| fs.partition.kind == TYPE_XBOOTLDR && !is_root(fs)).map(|fs| (fs, "")));
    folders.extend(root.map(|root| (root, "/boot")));
    let others = filesystems.iter().filter(|fs| fs.partition.kind != TYPE_XBOOTLDR && !is_root(fs));
    folders.extend(others.map(|fs| (fs, if fs.is_directory("/boot") { "/boot" } else { "" })));
    folders
}

struct Context<'a> {
    filesystems: &'a [Filesystem],
    root: Option<&'a Filesystem>,
    boot: &'a Filesystem,
    folder: &'static str,
}

impl<'a> Context<'a> {
    fn find(&self, notes: &mut Vec<String>) -> Option<Candidate<'a>> {
        let grub = ["grub", "grub2"].iter().find_map(|name| {
            let prefix = format!("{}/{name}", self.folder);
            Some((self.boot.read_config(&format!("{prefix}/grub.cfg"))?, prefix))
        });
        let outcome = grub.and_then(|(text, prefix)| {
            let device = device_name(&self.boot.partition);
            grub::run(self, &device, &prefix, &text)
                .map_err(|reason| notes.push(format!("{prefix}/grub.cfg of {}: {reason}", self.boot.partition.place())))
                .ok()
        });
        let (default, variables) = match &outcome {
            Some(GrubOutcome::Bls { default, variables }) => (default.clone(), variables.clone()),
            _ => (String::new(), HashMap::new()),
        };
        if let Some(candidate) = self.find_bls(&default, &variables, notes) {
            return Some(candidate);
        }
        if let Some(GrubOutcome::Boot(boot)) = outcome {
            match self.grub_candidate(&boot) {
                Ok(candidate) => return Some(candidate),
                Err(reason) => notes.push(reason),
            }
        }
        self.find_newest()
    }

    /// A path of a configuration: relative to the boot file system's root, or to where it is mounted.
    fn resolve(&self, path: &str) -> Option<String> {
        let path = format!("/{}", path.trim_start_matches('/'));
        let moved = || path.strip_prefix("/boot").filter(|rest| rest.starts_with('/')).map(str::to_owned);
        [Some(path.clone()), Some(format!("{}{path}", self.folder)), moved()]
            .into_iter()
            .flatten()
            .find(|path| self.boot.is_file(path))
    }

    fn find_bls(
        &self,
        grub_default: &str,
        variables: &HashMap<String, String>,
        notes: &mut Vec<String>,
    ) -> Option<Candidate<'a>> {
        let folder = format!("{}/loader/entries", self.folder);
        let mut entries: Vec<bls::Entry> = Vec::new();
        for name in self.boot.list(&folder).into_iter().take(MAX_BLS_ENTRIES) {
            let Some(id) = name.strip_suffix(".conf") else { continue };
            let text = self.boot.read_config(&format!("{folder}/{name}"));
            entries.extend(text.and_then(|text| bls::parse(id, &text)));
        }
        let loader = self.boot.read_config(&format!("{}/loader/loader.conf", self.folder)).unwrap_or_default();
        let loader_default =
            loader.lines().find_map(|line| line.trim().strip_prefix("default ")).unwrap_or_default().trim();
        bls::sort(&mut entries, if grub_default.is_empty() { loader_default } else { grub_default });
        for entry in entries {
            let Some(kernel) = self.resolve(&entry.linux) else {
                notes.push(format!("{folder}/{}.conf names {}, which is missing", entry.id, entry.linux));
                continue;
            };
            let initrds: Option<Vec<_>> =
                entry.initrds.iter().map(|path| Some((self.boot, self.resolve(path)?))).collect();
            let Some(initrds) = initrds else {
                notes.push(format!("{folder}/{}.conf names an initrd that is missing", entry.id));
                continue;
            };
            let cmdline = bls::expand(&entry.options, variables);
            return Some(Candidate { filesystem: self.boot, kernel, initrds, cmdline });
        }
        None
    }

    fn grub_candidate(&self, boot: &grub::GrubBoot) -> Result<Candidate<'a>, String> {
        let find = |file: &GrubFile| {
            let filesystem = self.by_device(&file.device).unwrap_or(self.boot);
            let missing = || format!("grub.cfg names {} on {}, which is missing", file.path, file.device);
            filesystem.is_file(&file.path).then(|| (filesystem, file.path.clone())).ok_or_else(missing)
        };
        let (filesystem, kernel) = find(&boot.kernel)?;
        let initrds = boot.initrds.iter().map(find).collect::<Result<_, _>>()?;
        Ok(Candidate { filesystem, kernel, initrds, cmdline: boot.cmdline.clone() })
    }

    fn find_newest(&self) -> Option<Candidate<'a>> {
        let mut kernels: Vec<(String, String)> = Vec::new();
        for name in self.boot.list(if self.folder.is_empty() { "/" } else { self.folder }) {
            let version = ["vmlinuz", "vmlinux", "bzImage"].iter().find_map(|stem| name.strip_prefix(stem));
            let Some(version) = version.filter(|v| v.is_empty() || v.starts_with('-')) else { continue };
            if !version.contains("rescue") && self.boot.is_file(&format!("{}/{name}", self.folder)) {
                kernels.push((version.trim_start_matches('-').to_owned(), name.clone()));
            }
        }
        let (version, name) = kernels.into_iter().max_by(|a, b| bls::compare_versions(&a.0, &b.0))?;
        let names = if version.is_empty() {
            vec!["initrd.img".to_owned(), "initrd".to_owned(), "initramfs".to_owned(), "initramfs.img".to_owned()]
        } else {
            ["initrd.img-{}", "initramfs-{}.img", "initrd-{}.img", "initrd-{}", "initramfs-{}"]
                .map(|form| form.replace("{}", &version))
                .to_vec()
        };
        let initrd = names.into_iter().map(|n| format!("{}/{n}", self.folder)).find(|path| self.boot.is_file(path));
        let initrds: Vec<_> = initrd.into_iter().map(|path| (self.boot, path)).collect();
        let cmdline = self.default_cmdline(!initrds.is_empty());
        Some(Candidate { filesystem: self.boot, kernel: format!("{}/{name}", self.folder), initrds, cmdline })
    }

    /// `/etc/kernel/cmdline` where the image has it, with a `root=` if that names none.
    fn default_cmdline(&self, has_initrd: bool) -> String {
        let root = self.root.unwrap_or(self.boot);
        let configured = root.read_config("/etc/kernel/cmdline").unwrap_or_default();
        let configured = configured.split_whitespace().collect::<Vec<_>>().join(" ");
        if configured.split(' ').any(|word| word.starts_with("root=")) {
            return configured;
        }
        let device = match &root.partition.part_uuid {
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None if has_initrd => format!("root=UUID={}", root.uuid),
            None => "root=/dev/vda".to_owned(),
        };
        format!("{device} ro {configured}").trim_end().to_owned()
    }

    /// `hd0,gpt1`, `hd0,msdos1`, `hd0,1` or `hd0`.
    fn by_device(&self, device: &str) -> Option<&'a Filesystem> {
        let number = match device.split_once(',') {
            Some((_, part)) => part.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()?,
            None => 0,
        };
        self.filesystems.iter().find(|fs| fs.partition.number == number)
    }
}

fn device_name(partition: &Partition) -> String {
    if partition.number == 0 { "hd0".to_owned() } else { format!("hd0,gpt{}", partition.number) }
}

impl GrubHost for Context<'_> {
    fn read(&self, device: &str, path: &str) -> Option<String> {
        self.by_device(device)?.read_config(path)
    }

    fn is_file(&self, device: &str, path: &str) -> bool {
        self.by_device(device).is_some_and(|fs| fs.is_file(path))
    }

    fn is_directory(&self, device: &str, path: &str) -> bool {
        self.by_device(device).is_some_and(|fs| fs.is_directory(path))
    }

    fn size(&self, device: &str, path: &str) -> Option<u64> {
        self.by_device(device)?.file_size(path)
    }

    fn search(&self, by: SearchBy, value: &str) -> Option<String> {
        let found = self.filesystems.iter().find(|fs| match by {
            SearchBy::Uuid => fs.uuid.eq_ignore_ascii_case(value),
            SearchBy::Label => fs.label == value,
            SearchBy::File => fs.is_file(value),
        });
        found.map(|fs| device_name(&fs.partition))
    }
}

fn load(candidate: &Candidate<'_>, overrides: &Override) -> Result<BootSet, BootError> {
    let cmdline = command_line(&candidate.cmdline, overrides)?;
    let kernel = candidate.filesystem.read(&candidate.kernel, MAX_KERNEL_BYTES)?;
    let place = candidate.filesystem.partition.place();
    if kernel_kind(&kernel) == KernelKind::Other {
        return Err(BootError::NotAKernel { path: candidate.kernel.clone(), place });
    }
    let mut initrd: Option<Vec<u8>> = None;
    for (filesystem, path) in candidate.initrds.iter().take(MAX_INITRDS) {
        let used = initrd.as_ref().map_or(0, |joined| joined.len() as u64);
        let content = filesystem.read(path, MAX_INITRD_BYTES.saturating_sub(used))?;
        match &mut initrd {
            None => initrd = Some(content),
            Some(joined) => {
                // cpio archives follow each other at multiples of four bytes.
                joined.resize(joined.len().next_multiple_of(4), 0);
                joined.extend_from_slice(&content);
            }
        }
    }
    Ok(BootSet { kernel, kernel_place: format!("{} of {place}", candidate.kernel), initrd, cmdline })
}

/// The command line to boot with: overrides applied, the serial console added unless some console is named.
fn command_line(found: &str, overrides: &Override) -> Result<String, BootError> {
    let base = if overrides.cmdline.trim().is_empty() { found } else { &overrides.cmdline };
    let mut words: Vec<&str> = base.split_whitespace().chain(overrides.extra_cmdline.split_whitespace()).collect();
    if !words.iter().any(|word| word.starts_with("console=")) {
        words.push("console=ttyS0");
    }
    let line: String = words.join(" ").chars().filter(|c| !c.is_control()).collect();
    if line.len() > MAX_CMDLINE { Err(BootError::CommandLine(line.len())) } else { Ok(line) }
}
