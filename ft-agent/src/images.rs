//! vmft's own guests: finds the files that `guest-images/build` has built for them.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Deserialize;

use crate::error::Error;
use crate::image_list;

/// One of vmft's own guests, built by `guest-images/build`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BundledGuest {
    /// Linux with redis and a web server.
    Linux,
    /// The bare-metal test guest.
    Bare,
}

/// The files that a guest boots from.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Kernel file.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk file.
    pub initrd: Option<PathBuf>,
    /// Kernel command line of the guest.
    pub cmdline: Option<String>,
}

/// Finds the files of a guest in the list that the build left in its cache.
///
/// # Errors
/// [`Error::Config`] when the guest has not been built.
pub fn find(guest: BundledGuest) -> Result<Images, Error> {
    let name = match guest {
        BundledGuest::Linux => "linux",
        BundledGuest::Bare => "bare",
    };
    let list = image_list::path(name);
    let text = std::fs::read_to_string(&list).map_err(|e| {
        Error::config(
            "guest",
            format!("cannot read {}: {e}; build the guest with guest-images/build {name}", list.display()),
        )
    })?;
    let value = |key: &str| image_list::value(&text, name, key);
    let images = Images {
        kernel: value("kernel").map(PathBuf::from),
        initrd: value("initrd").map(PathBuf::from),
        cmdline: value("cmdline"),
    };
    match &images.kernel {
        Some(_) => Ok(images),
        None => Err(Error::config(
            "guest",
            format!(
                "{} has no line {name}.kernel=...; build the guest again with guest-images/build {name}",
                list.display()
            ),
        )),
    }
}
