//! Checked names and ids. A value of these types is always valid, wherever it came from: the constructors and the
//! decoders (`serde`) apply the same rules.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// The largest number of disks that a VM may have.
pub const DISKS_MAX: usize = 16;

/// Why a text or number is not a valid name or id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A name has 1 to 64 bytes.
    #[error("a name must have 1 to {NAME_BYTES_MAX} bytes; this one has {0}")]
    Length(usize),
    /// A name is made of letters, digits, `.`, `_` and `-`, and starts with a letter or digit.
    #[error(
        "byte {at} of the name is {byte:#04x}: only a-z A-Z 0-9 . _ - are allowed, and the first is a letter or digit"
    )]
    Byte {
        /// Offset of the first byte that is not allowed.
        at: usize,
        /// That byte.
        byte: u8,
    },
    /// An id is 32 hexadecimal digits and not zero.
    #[error("{0:?} is not an id: an id is 32 hexadecimal digits that are not all zero")]
    Id(String),
    /// A key id is 64 hexadecimal digits.
    #[error("{0:?} is not a key id: a key id is 64 hexadecimal digits")]
    KeyId(String),
}

fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(NameError::Length(name.len()));
    }
    let allowed = |at: usize, b: u8| b.is_ascii_alphanumeric() || (at > 0 && matches!(b, b'.' | b'_' | b'-'));
    match name.bytes().enumerate().find(|&(at, b)| !allowed(at, b)) {
        Some((at, byte)) => Err(NameError::Byte { at, byte }),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name(&name)?;
                Ok(Self(name.into()))
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                name.to_owned().try_into()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

name! {
    /// The name of a VM: 1 to 64 bytes of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
    VmName
}
name! {
    /// The name of one of a VM's disks; the rules of [`VmName`] apply.
    DiskName
}
name! {
    /// The name of a store's cluster; the rules of [`VmName`] apply.
    ClusterName
}
name! {
    /// The name of a host or an operator, under which others keep its certificate; the rules of [`VmName`] apply.
    PartyName
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u128", into = "u128")]
        pub struct $name(u128);

        impl $name {
            /// A new random id.
            #[cfg(feature = "random")]
            pub fn random() -> Self {
                loop {
                    if let Ok(id) = Self::try_from(rand::random::<u128>()) {
                        return id;
                    }
                }
            }
        }
        impl TryFrom<u128> for $name {
            type Error = NameError;
            fn try_from(id: u128) -> Result<Self, NameError> {
                if id == 0 { Err(NameError::Id("0".into())) } else { Ok(Self(id)) }
            }
        }
        impl From<$name> for u128 {
            fn from(id: $name) -> u128 {
                id.0
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                let id = u128::from_str_radix(text, 16).ok().filter(|_| digits);
                id.and_then(|id| id.try_into().ok()).ok_or_else(|| NameError::Id(text.into()))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
    };
}

id! {
    /// The random id of a machine's state, made with that state and kept only in RAM: what a generation's holder is known by.
    /// Shown as 32 hexadecimal digits.
    Incarnation
}
id! {
    /// The id of one copy of a disk image, stored in the image's sidecar file. Shown as 32 hexadecimal digits.
    CopyId
}
id! {
    /// The random id of one run of a member of the store, from a start to the next.
    RunId
}

/// What a key is known by: the SHA-256 of its certificate. Shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyId(pub [u8; 32]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut id = [0; 32];
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NameError::KeyId(text.into()));
        }
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16)
                .map_err(|_| NameError::KeyId(text.into()))?;
        }
        Ok(Self(id))
    }
}

/// Counts the pairs that a VM has had; the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of a VM's first pair.
    pub const FIRST: Generation = Generation(1);

    /// The next generation; `None` if the number would overflow.
    pub fn next(self) -> Option<Generation> {
        self.0.checked_add(1).map(Generation)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_wherever_they_come_from() {
        assert_eq!("".parse::<VmName>(), Err(NameError::Length(0)));
        assert_eq!("a".repeat(65).parse::<VmName>(), Err(NameError::Length(65)));
        assert_eq!("a/b".parse::<VmName>(), Err(NameError::Byte { at: 1, byte: b'/' }));
        assert_eq!("-a".parse::<DiskName>(), Err(NameError::Byte { at: 0, byte: b'-' }));
        assert_eq!("vm-1.blue_2".parse::<VmName>().unwrap().as_str(), "vm-1.blue_2");
        let encoded = postcard::to_stdvec("a b").unwrap();
        assert!(postcard::from_bytes::<VmName>(&encoded).is_err());
    }

    #[test]
    fn ids_are_never_zero_and_read_back_what_they_show() {
        assert!("0".repeat(32).parse::<Incarnation>().is_err());
        assert!("+".repeat(32).parse::<Incarnation>().is_err());
        assert!(Incarnation::try_from(0).is_err());
        assert!(postcard::from_bytes::<CopyId>(&postcard::to_stdvec(&0u128).unwrap()).is_err());
        let id = Incarnation::try_from(0x1234_5678 << 96 | 9).unwrap();
        assert_eq!(id.to_string().parse::<Incarnation>(), Ok(id));
        let key = KeyId(std::array::from_fn(|at| (at as u8).wrapping_mul(9)));
        assert_eq!(key.to_string().parse::<KeyId>(), Ok(key));
        assert!("+1".repeat(32).parse::<KeyId>().is_err());
        assert!("1".repeat(63).parse::<KeyId>().is_err());
    }
}
