//! `hearth image build`: runs the recipe tool of the images/ folder and imports what it made.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use hearth_proto::v1::Image;

use super::upload;
use crate::args::image::{BuildArgs, DEFAULT_RECONNECT, ImageFormat, ImportArgs};
use crate::client::Client;
use crate::error::CliError;

/// Where packages put the recipes.
const INSTALLED: &str = "/usr/share/hearth/images";

pub async fn build(client: &Client, args: BuildArgs) -> Result<Image, CliError> {
    let name = args.name.unwrap_or_else(|| args.recipe.clone());
    let tool = find_tool(
        std::env::var_os("HEARTH_IMAGES_DIR").map(PathBuf::from).as_deref(),
        std::env::current_exe().ok().as_deref(),
        Path::new(INSTALLED),
    )?;
    let scratch = Scratch::new()?;
    let disk = match &args.keep {
        Some(path) if path.extension().is_none_or(|extension| extension != "raw") => {
            return Err(CliError::Usage(format!("--keep {}: the file's name must end in .raw", path.display())));
        }
        Some(path) => path.clone(),
        None => scratch.0.join("disk.raw"),
    };
    let mut command = tokio::process::Command::new(&tool);
    command.args(&args.arguments).arg(&args.recipe).arg(&disk).stdin(Stdio::null()).kill_on_drop(true);
    // Its progress lines go to standard error: standard output is for the answer.
    command.stdout(std::io::stderr());
    let status = command.status().await.map_err(CliError::io(format!("run {}", tool.display())))?;
    if !status.success() {
        return Err(CliError::Program(format!("{} {} failed ({status})", tool.display(), args.recipe)));
    }
    let import = ImportArgs {
        file: disk,
        name: Some(name),
        format: Some(ImageFormat::Raw),
        register: args.register,
        client_token: None,
        reconnect_for: DEFAULT_RECONNECT,
    };
    upload::import(client, import).await
}

fn find_tool(named: Option<&Path>, program: Option<&Path>, installed: &Path) -> Result<PathBuf, CliError> {
    let mut folders: Vec<PathBuf> = Vec::new();
    match named {
        Some(folder) => folders.push(folder.to_owned()),
        None => {
            folders.push(PathBuf::from("images"));
            // target/release/hearth of a source tree.
            folders.extend(program.into_iter().flat_map(Path::ancestors).skip(1).take(4).map(|dir| dir.join("images")));
            folders.push(installed.to_owned());
        }
    }
    let tool = folders.iter().map(|folder| folder.join("build")).find(|tool| tool.is_file());
    let absolute = tool.and_then(|tool| std::path::absolute(tool).ok());
    absolute.ok_or_else(|| CliError::NotFound {
        message: format!(
            "no recipes in {}",
            folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
        ),
        advice: "HEARTH_IMAGES_DIR names the folder that holds `build` and the recipes.".to_owned(),
    })
}

/// A folder for one disk image; not under /tmp, which may be memory.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, CliError> {
        let path = PathBuf::from(format!("/var/tmp/hearth-image-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(CliError::io(format!("make {}", path.display())))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tool_is_found_where_it_is_named_else_beside_the_source_tree() {
        let folder = tempfile::TempDir::new().unwrap();
        let images = folder.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let program = folder.path().join("target/release/hearth");
        let nowhere = Path::new("/nonexistent");
        assert_eq!(find_tool(None, Some(&program), nowhere).unwrap_err().exit_code(), 3);
        std::fs::write(images.join("build"), "").unwrap();
        assert_eq!(find_tool(None, Some(&program), nowhere).unwrap(), images.join("build"));
        assert_eq!(find_tool(Some(&images), None, nowhere).unwrap(), images.join("build"));
        assert!(find_tool(Some(nowhere), Some(&program), &images).unwrap_err().to_string().contains("/nonexistent"));
    }
}
