//! What is wrong with bytes that are not a valid message.

use entry::codec::{DecodeError, DecodeFault};

use crate::versions::{ChannelVersions, OURS};

/// The bytes are not a valid message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("channel: byte {offset}: {fault}")]
pub struct MessageError {
    /// Offset in the connection's bytes.
    pub offset: u64,
    /// What is wrong there.
    pub fault: MessageFault,
}

/// What is wrong with the bytes at an offset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum MessageFault {
    #[error("this is not a vmft channel (the magic number differs): check the address and port of the peer")]
    Magic,
    #[error(
        "the peer speaks {0} of the channel's protocol and this vmft {OURS}, so they have none in common: replace \
         the older of the two releases of vmft"
    )]
    Versions(ChannelVersions),
    #[error("the first message, and only the first, must be a hello")]
    Hello,
    #[error("message kind {0} is unknown")]
    Kind(u8),
    #[error("the message continues after its last field")]
    Long,
    #[error("the {0} are not in ascending order")]
    Order(&'static str),
    #[error("{0}")]
    Field(DecodeFault),
}

impl From<DecodeError> for MessageError {
    fn from(e: DecodeError) -> MessageError {
        MessageError { offset: e.offset, fault: MessageFault::Field(e.fault) }
    }
}
