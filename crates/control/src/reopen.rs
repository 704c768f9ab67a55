//! One routine for backends that have to be closed before another one can be opened in their place.

use crate::CommandError;

/// What is open after [`open_or_reopen`].
#[derive(Debug)]
pub(crate) enum Reopened<B> {
    /// The new backend.
    New(B),
    /// The old backend, because the new one cannot be opened.
    Old(B, CommandError),
    /// Nothing: neither can be opened. The first error is that of the new one.
    Nothing { error: CommandError, lost: CommandError },
}

/// Opens the backend of `new`. If that fails, opens the backend of `old` again, which was closed
/// before.
pub(crate) fn open_or_reopen<C, B>(
    new: &C,
    old: &C,
    mut open: impl FnMut(&C) -> Result<B, CommandError>,
) -> Reopened<B> {
    let error = match open(new) {
        Ok(backend) => return Reopened::New(backend),
        Err(error) => error,
    };
    match open(old) {
        Ok(backend) => Reopened::Old(backend, error),
        Err(lost) => Reopened::Nothing { error, lost },
    }
}
