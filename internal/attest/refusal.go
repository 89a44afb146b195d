package attest

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// domain of the error details.
const domain = "isthmus.dev"

// serverTimeKey of an ErrorInfo's metadata holds isthmusd's clock, so that an
// agent can tell a wrong clock from a wrong certificate.
const serverTimeKey = "serverTime"

// Refusal is an error for the one who asked: one line of cause and remedy, and a
// reason for programs.
type Refusal struct {
	Code   codes.Code
	Reason string // UPPER_SNAKE_CASE
	Cause  string
	Remedy string
}

// Refuse makes a refusal.
func Refuse(code codes.Code, reason, cause, remedy string) *Refusal {
	return &Refusal{Code: code, Reason: reason, Cause: cause, Remedy: remedy}
}

// Error gives cause and remedy on one line.
func (r *Refusal) Error() string { return r.Cause + "; " + r.Remedy }

// GRPCStatus is what grpc sends for it.
func (r *Refusal) GRPCStatus() *status.Status {
	st := status.New(r.Code, r.Error())
	with, err := st.WithDetails(&errdetails.ErrorInfo{
		Reason: r.Reason, Domain: domain,
		Metadata: map[string]string{serverTimeKey: clock(time.Now())},
	})
	if err != nil {
		return st
	}
	return with
}

// Answer makes of any error what the caller is told: a refusal as it is, whatever
// wraps it; that the caller went away; or, logged here, that isthmusd could not
// do it. The text of such an error stays here: the caller may be anyone.
func Answer(log *slog.Logger, message string, err error) error {
	if r, ok := errors.AsType[*Refusal](err); ok {
		log.Info(message, "reason", r.Reason, "err", err)
		return r
	}
	for _, gone := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, gone) {
			return status.FromContextError(gone).Err()
		}
	}
	log.Error(message, "err", err)
	return Refuse(codes.Unavailable, "CONTROL_PLANE", "isthmusd could not do that now", "try again; isthmusd's log has the cause")
}

// Reason gives the reason of a refusal that came over the wire, or "".
func Reason(err error) string {
	if info := details(err); info != nil {
		return info.GetReason()
	}
	return ""
}

// ServerTime gives isthmusd's clock at the time of a refusal.
func ServerTime(err error) (time.Time, bool) {
	t, parseErr := time.Parse(time.RFC3339, details(err).GetMetadata()[serverTimeKey])
	return t, parseErr == nil
}

func details(err error) *errdetails.ErrorInfo {
	st, ok := status.FromError(err)
	if !ok {
		return nil
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			return info
		}
	}
	return nil
}
