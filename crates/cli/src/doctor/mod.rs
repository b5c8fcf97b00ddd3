//! `hearth doctor`
