// CUPTI: the profiler may be turned on, and sees no activity.
#include "stand_in.h"

#define FINE(name) \
    API int name(...) { return 0; }
FINE(cuptiActivityDisable)
FINE(cuptiActivityEnable)
FINE(cuptiActivityEnableCudaEventDeviceTimestamps)
FINE(cuptiActivityEnableDriverApi)
FINE(cuptiActivityEnableRuntimeApi)
FINE(cuptiActivityFlushAll)
FINE(cuptiActivityPopExternalCorrelationId)
FINE(cuptiActivityPushExternalCorrelationId)
FINE(cuptiActivityRegisterCallbacks)
FINE(cuptiActivityRegisterTimestampCallback)
FINE(cuptiActivitySetAttribute)
FINE(cuptiEnableCallback)
FINE(cuptiEnableDomain)
FINE(cuptiFinalize)
FINE(cuptiSubscribe)
FINE(cuptiUnsubscribe)

API int cuptiActivityGetNextRecord(...) {
    return 12;
}  // CUPTI_ERROR_MAX_LIMIT_REACHED: there is none
API int cuptiActivityGetNumDroppedRecords(void*, unsigned, std::size_t* dropped) {
    return *dropped = 0, 0;
}
API int cuptiGetVersion(unsigned* version) { return *version = 130000, 0; }
API int cuptiGetResultString(int, const char** text) {
    return *text = "a result of the stand-in for CUPTI", 0;
}
API int cuptiGetCallbackName(unsigned, unsigned, const char** name) { return *name = "?", 0; }
