//! What two machines must have in common to stay in the same state: FORMAT.md, "Header".

use std::collections::BTreeMap;

use crate::PositionUnit;
use crate::codec::{ByteReader, DecodeError, DecodeFault, put_varint};

/// Longest name of a field, in bytes.
pub const NAME_MAX: usize = 64;
/// Longest value of a field, in bytes.
pub const VALUE_MAX: usize = 4096;
/// Longest identity, in bytes.
pub const IDENTITY_MAX: usize = 65_536;

/// Prefix of the fields that are not compared: they only help to find the machine's files.
pub const HINT: &str = "hint-";
/// Name of the field that every identity has.
const POSITION_UNIT: &str = "position-unit";

/// Named properties of a machine: engine, RAM, devices, CPUID, kernel and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    unit: PositionUnit,
    fields: BTreeMap<String, String>,
}

/// Two machines differ in a field of their identities.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} ({theirs:?} there, {ours:?} here)")]
pub struct Mismatch {
    /// The first field, by name, that differs.
    pub field: String,
    /// Its value on this side; empty if it is absent.
    pub ours: String,
    /// Its value on the other side; empty if it is absent.
    pub theirs: String,
}

impl Identity {
    /// The identity of a machine that counts positions in this unit.
    pub fn new(unit: PositionUnit) -> Identity {
        Identity { unit, fields: BTreeMap::from([(POSITION_UNIT.into(), unit_name(unit).into())]) }
    }

    /// Adds a field.
    ///
    /// # Panics
    /// If the field exists already or is too long. Names and values come from the program itself.
    pub fn field(mut self, name: &str, value: impl ToString) -> Identity {
        let value = value.to_string();
        assert!(
            (1..=NAME_MAX).contains(&name.len()) && value.len() <= VALUE_MAX,
            "identity field {name} is too long"
        );
        assert!(self.fields.insert(name.into(), value).is_none(), "identity field {name} exists already");
        self
    }

    /// The unit of the positions.
    pub fn unit(&self) -> PositionUnit {
        self.unit
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }

    /// The fields in ascending order of their names.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Compares this identity with the other side's.
    ///
    /// # Errors
    /// A field differs.
    pub fn check(&self, theirs: &Identity) -> Result<(), Mismatch> {
        let names = self.fields.keys().chain(theirs.fields.keys());
        let compared = names.filter(|n| !n.starts_with(HINT));
        let differing = compared.filter(|n| self.fields.get(*n) != theirs.fields.get(*n)).min();
        match differing {
            None => Ok(()),
            Some(field) => {
                let value = |i: &Identity| i.fields.get(field).cloned().unwrap_or_default();
                Err(Mismatch { field: field.clone(), ours: value(self), theirs: value(theirs) })
            }
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for text in self.fields().flat_map(|(n, v)| [n, v]) {
            put_varint(text.len() as u64, &mut out);
            out.extend(text.as_bytes());
        }
        assert!(out.len() <= IDENTITY_MAX, "the identity has {} bytes", out.len());
        out
    }

    pub(crate) fn decode(bytes: &[u8], base: u64) -> Result<Identity, DecodeError> {
        let mut r = ByteReader::new(bytes, base);
        let mut fields = BTreeMap::<String, String>::new();
        while !r.is_done() {
            let offset = r.offset();
            let name = text(&mut r, "identity name", 1, NAME_MAX)?;
            if fields.last_key_value().is_some_and(|(last, _)| *last >= name) {
                return Err(DecodeError { offset, fault: DecodeFault::FieldOrder(name) });
            }
            let value = text(&mut r, "identity value", 0, VALUE_MAX)?;
            fields.insert(name, value);
        }
        let unit = fields.get(POSITION_UNIT).map(String::as_str).unwrap_or_default();
        let unit = unit_named(unit)
            .ok_or(DecodeError { offset: base, fault: DecodeFault::PositionUnit(unit.into()) })?;
        Ok(Identity { unit, fields })
    }
}

fn text(r: &mut ByteReader<'_>, what: &'static str, min: usize, max: usize) -> Result<String, DecodeError> {
    let offset = r.offset();
    let bytes = r.prefixed_bytes(what, min, max)?;
    String::from_utf8(bytes).map_err(|_| DecodeError { offset, fault: DecodeFault::Utf8 { what } })
}

const UNITS: [(PositionUnit, &str); 4] = [
    (PositionUnit::Instructions, "instructions"),
    (PositionUnit::SynchronousExits, "synchronous-exits"),
    (PositionUnit::Branches, "branches"),
    (PositionUnit::Steps, "steps"),
];

fn unit_name(unit: PositionUnit) -> &'static str {
    UNITS.iter().find(|(u, _)| *u == unit).map(|(_, name)| *name).expect("every unit has a name")
}

fn unit_named(name: &str) -> Option<PositionUnit> {
    UNITS.iter().find(|(_, n)| *n == name).map(|(u, _)| *u)
}
