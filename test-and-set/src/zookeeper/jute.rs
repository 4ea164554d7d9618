//! ZooKeeper's encoding: numbers are big-endian, and texts, bytes and lists begin with their length.

use crate::zookeeper_error::ZooKeeperError;

/// Encodes a request.
#[derive(Default)]
pub(super) struct JuteWriter(pub(super) Vec<u8>);

impl JuteWriter {
    pub(super) fn int(mut self, value: i32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn long(mut self, value: i64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn flag(mut self, value: bool) -> Self {
        self.0.push(value.into());
        self
    }

    /// Requests are far smaller than 2 GiB.
    pub(super) fn bytes(self, value: &[u8]) -> Self {
        let mut writer = self.int(value.len() as i32);
        writer.0.extend(value);
        writer
    }

    pub(super) fn text(self, value: &str) -> Self {
        self.bytes(value.as_bytes())
    }
}

/// Decodes an answer. Nothing is allocated by a length that the other side sent.
pub(super) struct JuteReader<'a>(pub(super) &'a [u8]);

impl<'a> JuteReader<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], ZooKeeperError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(ZooKeeperError::Malformed(what))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn int(&mut self, what: &'static str) -> Result<i32, ZooKeeperError> {
        let bytes = self.take(4, what)?;
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | i32::from(*byte)))
    }

    pub(super) fn skip(&mut self, count: usize, what: &'static str) -> Result<(), ZooKeeperError> {
        self.take(count, what).map(drop)
    }

    /// A length; -1 stands for nothing.
    fn length(&mut self, what: &'static str) -> Result<usize, ZooKeeperError> {
        match self.int(what)? {
            -1 => Ok(0),
            length => usize::try_from(length).map_err(|_| ZooKeeperError::Malformed(what)),
        }
    }

    pub(super) fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], ZooKeeperError> {
        let length = self.length(what)?;
        self.take(length, what)
    }

    pub(super) fn text(&mut self, what: &'static str) -> Result<&'a str, ZooKeeperError> {
        std::str::from_utf8(self.bytes(what)?).map_err(|_| ZooKeeperError::Malformed(what))
    }

    pub(super) fn list<T>(
        &mut self,
        what: &'static str,
        item: impl Fn(&mut Self) -> Result<T, ZooKeeperError>,
    ) -> Result<Vec<T>, ZooKeeperError> {
        (0..self.length(what)?).map(|_| item(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bytes = JuteWriter::default().int(-2).long(7).flag(true).text("/vmft").bytes(&[1, 2]).0;
        let mut reader = JuteReader(&bytes);
        assert_eq!(reader.int("xid").expect("an int"), -2);
        reader.skip(9, "zxid").expect("a long and a flag");
        assert_eq!(reader.text("path").expect("a text"), "/vmft");
        assert_eq!(reader.bytes("data").expect("bytes"), [1, 2]);
        assert!(reader.0.is_empty());
    }

    #[test]
    fn lengths_are_not_believed() {
        for length in [i32::MAX, i32::MIN, -2, 3] {
            let bytes = JuteWriter::default().int(length).int(0).0;
            let texts = JuteReader(&bytes).list("names", |reader| reader.text("name"));
            assert!(matches!(texts, Err(ZooKeeperError::Malformed(_))), "{length}: {texts:?}");
        }
        assert!(JuteReader(&[255; 4]).bytes("data").expect("nothing").is_empty());
    }
}
