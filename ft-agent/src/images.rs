//! Finds the guests that `guest-images/build` made.

use std::path::PathBuf;

use crate::error::Error;
use crate::image_list;
use crate::options::Guest;

/// What a guest boots from.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Kernel file.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk file.
    pub initrd: Option<PathBuf>,
    /// Command line that the guest wants.
    pub cmdline: Option<String>,
}

/// Reads the `name=value` lines that the build left in its cache.
///
/// # Errors
/// [`Error::Config`] when the guest was not built.
pub fn find(guest: Guest) -> Result<Images, Error> {
    let name = match guest {
        Guest::Linux => "linux",
        Guest::Bare => "bare",
    };
    let list = image_list::path(name);
    let text = std::fs::read_to_string(&list).map_err(|e| {
        Error::config(
            "guest",
            format!("{}: {e}: build the guest with guest-images/build {name}", list.display()),
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
        None => {
            Err(Error::config("guest", format!("{} names no {name}.kernel: build it again", list.display())))
        }
    }
}
